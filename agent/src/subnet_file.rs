//! `subnet.env`, the contract file: what dockerd, CNI plugins and scripts read to learn this node's subnet, and what the
//! next agent, or flannel, reads to take the same subnet again.
//!
//! Written as flannel writes it, byte for byte; replaced by a rename, so that a reader sees the old or the new file and
//! never half of one. What is read back may have been written by anybody.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    durable_file,
    family::{Family, V4, V6},
};

/// The file's mode: everybody may read it.
pub(crate) const MODE: u32 = 0o644;

/// More than any `subnet.env`; what is larger is not one.
const LARGEST: u64 = 64 * 1024;

/// The content of `subnet.env`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetFile {
    /// The IPv4 network, of which each node has a subnet, and this node's subnet; host bits are ignored.
    pub v4: Option<(Ipv4Net, Ipv4Net)>,
    /// The same two of IPv6.
    pub v6: Option<(Ipv6Net, Ipv6Net)>,
    /// MTU for containers, in bytes.
    pub mtu: u16,
    /// Whether the agent masquerades; dockerd must then not.
    pub ip_masq: bool,
}

impl fmt::Display for SubnetFile {
    /// The subnet is given with its first host address, which is the bridge's (`dockerd --bip`).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((network, subnet)) = self.v4 {
            writeln!(f, "FLANNEL_NETWORK={}", network.trunc())?;
            writeln!(f, "FLANNEL_SUBNET={}", bridge::<V4>(subnet))?;
        }
        if let Some((network, subnet)) = self.v6 {
            writeln!(f, "FLANNEL_IPV6_NETWORK={}", network.trunc())?;
            writeln!(f, "FLANNEL_IPV6_SUBNET={}", bridge::<V6>(subnet))?;
        }
        writeln!(f, "FLANNEL_MTU={}", self.mtu)?;
        writeln!(f, "FLANNEL_IPMASQ={}", self.ip_masq)
    }
}

impl SubnetFile {
    /// Writes the file (mode 0644) and its directory (mode 0755), unless the file already says the same.
    /// Answers whether it was written.
    ///
    /// # Errors
    ///
    /// [`SubnetFileError::Write`]; the file is then as it was.
    pub fn write(&self, path: &Path) -> Result<bool, SubnetFileError> {
        let content = self.to_string();
        if matches!(read(path), Ok(Some(current)) if current == content) {
            return Ok(false);
        }
        durable_file::replace(path, content.as_bytes(), MODE)
            .map_err(|source| SubnetFileError::Write { path: path.into(), source })?;
        Ok(true)
    }
}

/// A subnet by the address that its bridge has, the second.
fn bridge<F: Family>(subnet: F::Net) -> F::Net {
    let second = F::of_number(F::number(F::base(subnet)).saturating_add(1));
    second.and_then(|second| F::net(second, F::prefix_len(subnet))).unwrap_or(subnet)
}

/// The subnet that the file at `path` gives, without host bits; `None` if there is no file or no subnet in it.
///
/// # Errors
///
/// [`SubnetFileError`] if the file cannot be read or its subnet cannot be understood. The caller goes on without
/// a previous subnet.
pub fn previous_subnet(path: &Path) -> Result<Option<Ipv4Net>, SubnetFileError> {
    previous::<V4>(path, "FLANNEL_SUBNET")
}

/// The overlay network that the file at `path` gives; like [`previous_subnet`].
///
/// # Errors
///
/// As [`previous_subnet`].
pub fn previous_network(path: &Path) -> Result<Option<Ipv4Net>, SubnetFileError> {
    previous::<V4>(path, "FLANNEL_NETWORK")
}

/// IPv4 network and subnet that the file at `path` gives; like [`previous_subnet`].
///
/// # Errors
///
/// As [`previous_subnet`].
pub fn previous_ipv4(path: &Path) -> Result<Option<(Ipv4Net, Ipv4Net)>, SubnetFileError> {
    Ok(previous_network(path)?.zip(previous_subnet(path)?))
}

/// The IPv6 subnet that the file at `path` gives; like [`previous_subnet`].
///
/// # Errors
///
/// As [`previous_subnet`].
pub fn previous_ipv6_subnet(path: &Path) -> Result<Option<Ipv6Net>, SubnetFileError> {
    previous::<V6>(path, "FLANNEL_IPV6_SUBNET")
}

/// IPv6 network and subnet that the file at `path` gives; like [`previous_subnet`].
///
/// # Errors
///
/// As [`previous_subnet`].
pub fn previous_ipv6(path: &Path) -> Result<Option<(Ipv6Net, Ipv6Net)>, SubnetFileError> {
    let network = previous::<V6>(path, "FLANNEL_IPV6_NETWORK")?;
    Ok(network.zip(previous_ipv6_subnet(path)?))
}

fn previous<F: Family>(path: &Path, key: &'static str) -> Result<Option<F::Net>, SubnetFileError> {
    let Some(content) = read(path)? else { return Ok(None) };
    let Some(value) = entry(&content, key) else { return Ok(None) };
    match value.parse::<F::Net>() {
        Ok(net) => Ok(Some(F::trunc(net))),
        Err(_) => {
            let value = value.chars().take(64).flat_map(char::escape_default).collect();
            Err(SubnetFileError::Value { path: path.into(), key, value })
        }
    }
}

/// The last value of `key` among `KEY=VALUE` lines, without quotes around it; `None` if it is missing or empty.
pub(crate) fn entry<'a>(content: &'a str, key: &str) -> Option<&'a str> {
    let value = content.lines().rev().find_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        line.strip_prefix(key)?.strip_prefix('=')
    })?;
    let value = value.trim();
    let unquoted = ['"', '\''].iter().find_map(|&quote| value.strip_prefix(quote)?.strip_suffix(quote));
    Some(unquoted.unwrap_or(value)).filter(|value| !value.is_empty())
}

/// The content of the file, or `None` if there is none. Never blocks: a named pipe is refused, not waited for.
pub(crate) fn read(path: &Path) -> Result<Option<String>, SubnetFileError> {
    let failed = |source| SubnetFileError::Read { path: path.into(), source };
    let file = match OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let is_file = file.metadata().map_err(failed)?.is_file();
    let mut content = Vec::new();
    if is_file {
        file.take(LARGEST + 1).read_to_end(&mut content).map_err(failed)?;
    }
    if !is_file || content.len() as u64 > LARGEST {
        return Err(SubnetFileError::NotASubnetFile { path: path.into() });
    }
    Ok(Some(String::from_utf8_lossy(&content).into_owned()))
}

/// The contract file cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SubnetFileError {
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a file of at most 64 KiB, so no subnet.env", path.display())]
    NotASubnetFile { path: PathBuf },
    #[error("{}: {key}={value} must be an {}", path.display(), right(key))]
    Value { path: PathBuf, key: &'static str, value: String },
}

fn right(key: &str) -> &'static str {
    if key.contains("IPV6") {
        "IPv6 address and prefix length, such as fc00:0:0:1::1/64"
    } else {
        "IPv4 address and prefix length, such as 10.5.72.1/24"
    }
}

#[cfg(test)]
mod tests;
