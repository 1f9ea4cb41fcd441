//! How the Kubernetes API is reached and what of it is used.

use std::path::PathBuf;

use crate::cli::KubeArgs;

/// How the Kubernetes API is reached and what of it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeConfig {
    /// The API server's URL; overrules the one in `kubeconfig`.
    pub api_url: Option<String>,
    /// Address and credentials; neither this nor `api_url`: those of the pod that we are.
    pub kubeconfig: Option<PathBuf>,
    /// What annotations begin with; ends with `/` or `-`.
    pub annotation_prefix: String,
    /// The file that holds the network config.
    pub net_config: PathBuf,
    /// Set the node's condition `NetworkUnavailable` to `False` once the node is ready.
    pub set_condition: bool,
}

impl KubeConfig {
    /// `None` where leases come from etcd; flags that then have no effect are told.
    pub(super) fn from_args(args: KubeArgs, warnings: &mut Vec<String>) -> Option<Self> {
        if args.kube_subnet_mgr {
            return Some(Self {
                api_url: args.kube_api_url,
                kubeconfig: args.kubeconfig_file,
                annotation_prefix: args.kube_annotation_prefix,
                net_config: args.net_config_path,
                set_condition: args.set_node_network_unavailable,
            });
        }
        let default_prefix = annotation_prefix(KubeArgs::ANNOTATION_PREFIX).ok();
        let set = [
            (args.kube_api_url.is_some(), "--kube-api-url"),
            (args.kubeconfig_file.is_some(), "--kubeconfig-file"),
            (Some(args.kube_annotation_prefix) != default_prefix, "--kube-annotation-prefix"),
            (args.net_config_path != *KubeArgs::NET_CONFIG_PATH, "--net-config-path"),
            (!args.set_node_network_unavailable, "--set-node-network-unavailable"),
        ];
        let set: Vec<&str> = set.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).collect();
        if !set.is_empty() {
            warnings
                .push(format!("without effect as long as --kube-subnet-mgr is false: {}", set.join(", ")));
        }
        None
    }
}

/// The prefix as flannel completes it: a domain name, a slash, and maybe more that a hyphen ends.
pub fn annotation_prefix(text: &str) -> Result<String, String> {
    let right = "must be a domain name, or one with a slash and a prefix of names behind it, such as \
                 flannel.alpha.coreos.com or example.com/overlay";
    let (domain, names) = text.split_once('/').unwrap_or((text, ""));
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    let domain_is_right =
        domain.contains('.') && domain.split('.').all(|label| !label.is_empty() && label.chars().all(plain));
    if !domain_is_right || !names.chars().all(plain) || names == "-" {
        return Err(right.into());
    }
    let end = if names.is_empty() || names.ends_with('-') { "" } else { "-" };
    Ok(format!("{domain}/{names}{end}"))
}

/// The URL of an API server.
pub fn api_url(text: &str) -> Result<String, String> {
    let right = "must be the URL of an API server, such as https://192.0.2.1:6443";
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).ok_or(right)?;
    let host = rest.split('/').next().unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:[]/%".contains(c);
    if host.is_empty() || host.starts_with(':') || !rest.chars().all(plain) {
        return Err(right.into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_completed_as_flannel_does() {
        for (text, prefix) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("foo.bar/", "foo.bar/"),
            ("foo.bar/baz", "foo.bar/baz-"),
            ("foo.bar/baz-", "foo.bar/baz-"),
            ("foo-bar.b_z.com/x1", "foo-bar.b_z.com/x1-"),
        ] {
            assert_eq!(annotation_prefix(text).as_deref(), Ok(prefix));
        }
        for text in [
            "",
            "foo",
            "foo/bar",
            "foo.bar/baz/",
            "foo.bar/a/b",
            "Foo.bar",
            "foo..bar",
            "foo.bar/A",
            "/a",
            "foo.bar/-",
        ] {
            assert!(annotation_prefix(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_api_url_has_a_scheme_and_a_host() {
        for text in [
            "https://192.0.2.1:6443",
            "http://localhost:8080/",
            "https://[2001:db8::1]:6443",
            "https://k.example/sub",
        ] {
            assert_eq!(api_url(text).as_deref(), Ok(text));
        }
        for text in
            ["", "192.0.2.1:6443", "https://", "https://:6443", "ftp://a", "https://a b", "https://u@h"]
        {
            assert!(api_url(text).is_err(), "{text}");
        }
    }
}
