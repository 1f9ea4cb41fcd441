//! Values of single flags. Each function takes the text of a value and answers with what it means, or with what would
//! be right; the caller adds the flag and the text.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use regex::Regex;

use crate::family::{Family as _, V6};

/// The shortest TTL of a lease. etcd itself grants nothing below its election timeout (1 s by default, rounded up to
/// 2 s), and a keep-alive goes out every third of the TTL: below 5 s one change of etcd's leader would lose the lease.
pub const SHORTEST_LEASE: Duration = Duration::from_secs(5);

/// The longest TTL of a lease: the subnet of a node that is gone for good stays taken for so long. Subnets that are to
/// stay for ever are reservations, keys without a TTL.
pub const LONGEST_LEASE: Duration = Duration::from_secs(365 * 24 * 3600);

/// A boolean in Go's syntax (`strconv.ParseBool`).
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

/// An IPv4 address that a host can have.
pub fn ipv4_address(text: &str) -> Result<Ipv4Addr, String> {
    match text.parse::<Ipv4Addr>() {
        Ok(address) if address.is_unspecified() || address.is_multicast() || address.is_broadcast() => {
            Err("must be the IPv4 address of a host, such as 192.0.2.1".into())
        }
        Ok(address) => Ok(address),
        Err(_) => Err("must be an IPv4 address, such as 192.0.2.1".into()),
    }
}

/// An IPv6 address that other hosts can reach a host by.
pub fn ipv6_address(text: &str) -> Result<Ipv6Addr, String> {
    match text.parse::<Ipv6Addr>() {
        Ok(address) if V6::is_host(address) && !address.is_unicast_link_local() => Ok(address),
        Ok(_) => Err("must be an IPv6 address that other hosts reach, such as 2001:db8::1".into()),
        Err(_) => Err("must be an IPv6 address, such as 2001:db8::1".into()),
    }
}

/// An address that a host can have, of either family.
pub fn host_address(text: &str) -> Result<IpAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => ipv4_address(text).map(IpAddr::V4),
        Ok(IpAddr::V6(_)) => ipv6_address(text).map(IpAddr::V6),
        Err(_) => Err("must be an IP address, such as 192.0.2.1 or 2001:db8::1".into()),
    }
}

/// An address to listen on.
pub fn ip_address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| "must be an IP address, such as 0.0.0.0 or 127.0.0.1".into())
}

/// An address and a port to listen on; without an address (`:9100`), all IPv4 addresses.
pub fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let whole = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    match whole.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err("must be an IP address and a port, such as 127.0.0.1:9100".into()),
    }
}

/// The path of a file.
pub fn file(text: &str) -> Result<PathBuf, String> {
    let last = text.rsplit('/').next().unwrap_or_default();
    if matches!(last, "" | "." | "..") || text.contains('\0') {
        return Err("must be the path of a file, such as /run/flannel/subnet.env".into());
    }
    Ok(text.into())
}

/// The absolute path of a directory.
pub fn directory(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let plain = path.components().all(|part| part != std::path::Component::ParentDir);
    if !path.is_absolute() || !plain || path.parent().is_none() || text.contains('\0') {
        return Err("must be the absolute path of a directory, such as /run/loden".into());
    }
    Ok(path.components().collect())
}

/// The TTL of a lease, from [`SHORTEST_LEASE`] to [`LONGEST_LEASE`].
pub fn lease_ttl(text: &str) -> Result<Duration, String> {
    let ttl = duration(text)?;
    if ttl < SHORTEST_LEASE {
        return Err("must be at least 5s, so that a lease outlives a change of etcd's leader".into());
    }
    if ttl > LONGEST_LEASE {
        return Err("must be at most 8760h (a year): the subnet of a lost node stays taken for so long; \
                    a subnet to keep for ever is a reservation"
            .into());
    }
    Ok(ttl)
}

/// A duration in whole seconds, written in Go's way with `h`, `m` and `s`: `24h`, `90m`, `1h30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    const RIGHT: &str = "must be a duration in hours, minutes and seconds, such as 24h, 90m or 1h30m";
    let mut seconds: u64 = 0;
    let mut smallest = u64::MAX;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(RIGHT)?;
        let unit = match rest.as_bytes()[digits] {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return Err(RIGHT.into()),
        };
        if unit >= smallest {
            return Err(RIGHT.into());
        }
        smallest = unit;
        let count: u64 = rest[..digits].parse().map_err(|_| RIGHT)?;
        seconds = count.checked_mul(unit).and_then(|part| seconds.checked_add(part)).ok_or(RIGHT)?;
        rest = &rest[digits + 1..];
    }
    if smallest == u64::MAX { Err(RIGHT.into()) } else { Ok(Duration::from_secs(seconds)) }
}

/// A regular expression.
pub fn regex(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        format!("must be a regular expression, such as ^eth[0-9]+$ ({reason})")
    })
}

/// Directives of `tracing`'s filter.
pub fn log_directives(text: &str) -> Result<String, String> {
    // tracing-subscriber 0.3.23 panics where it cuts a directive inside of a character.
    if !text.is_ascii() {
        return Err(
            "has other letters than ASCII; right is a level or a list such as info,loden_agent=debug".into(),
        );
    }
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; right is a level or a list such as info,loden_agent=debug")),
    }
}
