//! How etcd is reached: endpoints, key prefix, TLS files and user.

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use super::{ConfigError, Secret};
use crate::cli::EtcdArgs;

/// How etcd is reached and where our keys are in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// URLs with scheme, host and port, and nothing else; at least one.
    pub endpoints: Vec<String>,
    /// Begins with `/` and does not end with one; empty if the keys are at the root (`/config`).
    pub prefix: String,
    /// Key and certificate are both set or both not.
    pub key_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    /// May be set without a certificate of our own.
    pub ca_file: Option<PathBuf>,
    /// User and password are both set or both not.
    pub username: Option<String>,
    pub password: Option<Secret>,
}

impl EtcdConfig {
    pub(super) fn from_args(args: EtcdArgs, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let EtcdArgs {
            etcd_endpoints,
            etcd_prefix,
            etcd_keyfile,
            etcd_certfile,
            etcd_cafile,
            etcd_username,
            etcd_password,
        } = args;
        match (&etcd_keyfile, &etcd_certfile) {
            (Some(key), None) => return Err(lone("etcd-keyfile", key, "etcd-certfile")),
            (None, Some(certificate)) => return Err(lone("etcd-certfile", certificate, "etcd-keyfile")),
            _ => {}
        }
        let has_tls_files = etcd_certfile.is_some() || etcd_cafile.is_some();
        let endpoints: Vec<String> =
            etcd_endpoints.iter().map(|endpoint| endpoint.url(has_tls_files)).collect();
        if endpoints.is_empty() {
            return Err(ConfigError::new("etcd-endpoints", "", "must name at least one endpoint"));
        }
        let plain: Vec<&str> =
            endpoints.iter().map(String::as_str).filter(|url| url.starts_with("http://")).collect();
        if has_tls_files && !plain.is_empty() {
            warnings.push(format!(
                "TLS files are given, but these endpoints are spoken to without TLS: {}; \
                 write https:// in --etcd-endpoints to use them",
                plain.join(", ")
            ));
        }
        let (username, password) = match (etcd_username, etcd_password) {
            (Some(username), Some(password)) => (Some(username), Some(password)),
            (None, None) => (None, None),
            _ => {
                warnings.push(
                    "--etcd-username and --etcd-password work only together; one is missing, so etcd is asked \
                     without either"
                        .into(),
                );
                (None, None)
            }
        };
        Ok(Self {
            endpoints,
            prefix: etcd_prefix,
            key_file: etcd_keyfile,
            cert_file: etcd_certfile,
            ca_file: etcd_cafile,
            username,
            password,
        })
    }
}

fn lone(flag: &'static str, file: &std::path::Path, other: &str) -> ConfigError {
    ConfigError::new(flag, file.display(), format_args!("needs --{other} beside it"))
}

/// One of etcd's client endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `None`: as the TLS files say.
    tls: Option<bool>,
    /// `host:port`, the host an IPv6 address in brackets or a name.
    authority: String,
}

impl Endpoint {
    /// The endpoint as a URL; one that was given without a scheme uses TLS if `tls_by_default`.
    #[must_use]
    pub fn url(&self, tls_by_default: bool) -> String {
        let scheme = if self.tls.unwrap_or(tls_by_default) { "https" } else { "http" };
        format!("{scheme}://{}", self.authority)
    }
}

impl FromStr for Endpoint {
    type Err = String;

    /// Takes `http://host:port`, `https://host:port` and `host:port`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let right = "must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, such as http://192.0.2.1:2379";
        let text = text.trim();
        let (tls, rest) = match text.split_once("://") {
            None => (None, text),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (Some(false), rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (Some(true), rest),
            Some(_) => return Err(right.into()),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err("must not hold a user; give --etcd-username and --etcd-password".into());
        }
        if authority.is_empty() {
            return Err(right.into());
        }
        let port_missing = "names no port; etcd's client port is usually 2379, so HOST:2379";
        let (host, port) = authority.rsplit_once(':').ok_or(port_missing)?;
        if host.ends_with(':') || (host.starts_with('[') && !host.ends_with(']')) {
            return Err(port_missing.into());
        }
        let host_is_right = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => address.parse::<Ipv6Addr>().is_ok(),
            None => {
                !host.is_empty()
                    && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            }
        };
        let port_is_right =
            port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
        if !host_is_right || !port_is_right {
            return Err(right.into());
        }
        Ok(Self { tls, authority: authority.to_owned() })
    }
}

/// The key prefix: begins with `/`; slashes at its end and repeated ones are dropped, as flannel's `path.Join` does.
pub fn prefix(text: &str) -> Result<String, String> {
    let right = "must be a key that begins with /, such as /coreos.com/network";
    if !text.starts_with('/') || text.chars().any(char::is_control) {
        return Err(right.into());
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err(right.into());
    }
    Ok(parts.iter().map(|part| format!("/{part}")).collect())
}
