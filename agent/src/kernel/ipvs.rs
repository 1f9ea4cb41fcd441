//! IPVS's table of connections: what kube-proxy's mode `ipvs` translates, which netfilter's table does not tell.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr},
};

use super::conntrack::Path;
use crate::family::Family;

/// Of the network namespace of the calling thread; only where the kernel has loaded ip_vs.
const TABLE: &str = "/proc/thread-self/net/ip_vs_conn";

/// The packets of the family that IPVS translates now, of both directions of each connection; none without IPVS.
///
/// # Errors
///
/// Where there is a table that cannot be read.
pub fn translated<F: Family>() -> io::Result<BTreeSet<Path<F>>> {
    match fs::read_to_string(TABLE) {
        Ok(table) => Ok(table.lines().filter_map(paths).flatten().collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

/// One connection: protocol, client, service and backend, each with its port (`ip_vs_conn_seq_show` in
/// net/netfilter/ipvs/ip_vs_conn.c). `None` for what is none of the family, such as the head.
fn paths<F: Family>(line: &str) -> Option<[Path<F>; 2]> {
    let mut words = line.split_whitespace().skip(1).step_by(2);
    let mut next = || F::addr(address(words.next()?)?);
    let (client, service, backend) = (next()?, next()?, next()?);
    Some([Path { source: client, destination: service }, Path { source: backend, destination: client }])
}

/// IPv4 is printed as eight hexadecimal digits, the first octet first, IPv6 with all of its digits and colons.
fn address(word: &str) -> Option<IpAddr> {
    if word.len() == 8 && !word.contains(':') {
        return u32::from_str_radix(word, 16).ok().map(|number| Ipv4Addr::from(number).into());
    }
    word.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    const HEAD: &str = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData";
    const LINE: &str = "TCP 0A050102 A4D2 0A600001 0050 0A050203 1F90 ESTABLISHED     899";
    const LINE6: &str = "UDP fc00:0000:0000:0001:0000:0000:0000:0002 A4D2 fd10:0096:0000:0000:0000:0000:0000:0001 \
        0050 fc00:0000:0000:0002:0000:0000:0000:0003 1F90 UDP             299";

    #[test]
    fn a_connection_has_a_path_to_the_service_and_one_from_the_backend() {
        let path = |source: &str, destination: &str| Path::<V4> {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        let expected = [path("10.5.1.2", "10.96.0.1"), path("10.5.2.3", "10.5.1.2")];
        assert_eq!(paths::<V4>(LINE), Some(expected));
        assert_eq!(paths::<V6>(LINE), None);
    }

    #[test]
    fn ipv6_has_the_same() {
        let path = |source: &str, destination: &str| Path::<V6> {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        let expected = [path("fc00:0:0:1::2", "fd10:96::1"), path("fc00:0:0:2::3", "fc00:0:0:1::2")];
        assert_eq!(paths::<V6>(LINE6), Some(expected));
        assert_eq!(paths::<V4>(LINE6), None);
    }

    #[test]
    fn what_is_no_connection_is_passed_over() {
        for line in [HEAD, "", "TCP 0A050102 A4D2 0A600001"] {
            assert_eq!(paths::<V4>(line), None, "{line}");
        }
    }
}
