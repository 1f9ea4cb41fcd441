//! From flags to what the programs compare with.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use ipnet::IpNet;
use loden_ebpf::{
    reason::Reason,
    trace::{ANY_PROTOCOL, Prefix, Tracer, mapped},
};

use super::{TraceArgs, Verdict};

/// An address or a prefix, its host bits cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net(IpNet);

pub(super) fn prefix(text: &str) -> Result<Net, String> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map(|net| Net(net.trunc()))
        .map_err(|_| "neither an address such as 10.5.1.2 nor a prefix such as 10.5.1.0/24".to_owned())
}

pub(super) fn protocol(text: &str) -> Result<u8, String> {
    PROTOCOLS.iter().find(|(_, name)| *name == text).map(|(number, _)| *number).map_or_else(
        || text.parse().map_err(|_| "neither tcp, udp, icmp, icmpv6 nor a number from 0 to 255".to_owned()),
        Ok,
    )
}

/// Protocols that have a name here.
pub(super) const PROTOCOLS: [(u8, &str); 5] =
    [(1, "icmp"), (6, "tcp"), (17, "udp"), (58, "icmpv6"), (132, "sctp")];

pub(super) fn reason(text: &str) -> Result<Reason, String> {
    let all = || Reason::ALL.iter();
    if let Some(reason) = all().find(|reason| reason.name() == text) {
        return Ok(*reason);
    }
    let alike: Vec<&str> =
        all().map(|reason| reason.name()).filter(|name| !text.is_empty() && name.contains(text)).collect();
    let names = if alike.is_empty() { all().map(|reason| reason.name()).collect() } else { alike };
    Err(format!("no such reason; there are {}", names.join(", ")))
}

/// The verdict that a reason belongs to.
pub(super) fn verdict_of(reason: Reason) -> Verdict {
    match reason.name().split('_').next() {
        Some("fast") => Verdict::Fast,
        Some("drop") => Verdict::Drop,
        Some("note") => Verdict::Note,
        _ => Verdict::Pass,
    }
}

/// What the programs are told.
///
/// # Errors
///
/// Where verdicts and reasons leave nothing.
pub(super) fn tracer(args: &TraceArgs) -> Result<Tracer> {
    let is_wanted = |reason: &&Reason| {
        (args.reason.is_empty() || args.reason.contains(reason))
            && (args.verdict.is_empty() || args.verdict.contains(&verdict_of(**reason)))
    };
    let reasons = Reason::ALL.iter().filter(is_wanted).fold(0, |set, reason| set | 1 << *reason as u32);
    ensure!(
        reasons != 0,
        "--verdict and --reason rule each other out: no reason that is named has such a verdict"
    );
    let mut tracer = Tracer {
        reasons,
        every: args.sample,
        port: args.port.unwrap_or(0),
        protocol: args.proto.map_or(ANY_PROTOCOL, u16::from),
        ..Tracer::default()
    };
    for (end, net) in tracer.ends.iter_mut().zip(&args.ends) {
        *end = as_prefix(net.0);
    }
    Ok(tracer)
}

fn as_prefix(net: IpNet) -> Prefix {
    match net {
        IpNet::V4(net) => Prefix {
            address: mapped(net.network().octets()),
            // The 96 bits before an IPv4 address count as well, or IPv6 would match 0.0.0.0/0.
            mask: halves((u128::MAX << (32 - net.prefix_len())).to_be_bytes()),
        },
        IpNet::V6(net) => {
            Prefix { address: halves(net.network().octets()), mask: halves(net.netmask().octets()) }
        }
    }
}

/// Sixteen bytes as two words, as they stand.
fn halves(bytes: [u8; 16]) -> [u64; 2] {
    let mut words = [0; 2];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use loden_ebpf::trace::Traced;

    use super::*;
    use crate::cli::{self, Command};

    fn args(line: &str) -> TraceArgs {
        let words = ["loden", "trace"].into_iter().chain(line.split_whitespace()).map(Into::into);
        match cli::parse(words, &|_| None) {
            Ok(Command::Trace(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(line: &str) -> String {
        let words = ["loden", "trace"].into_iter().chain(line.split_whitespace()).map(Into::into);
        cli::parse(words, &|_| None).unwrap_err().text
    }

    fn packet(source: &str, destination: &str) -> Traced {
        let words = |text: &str| match text.parse().unwrap() {
            IpAddr::V4(address) => mapped(address.octets()),
            IpAddr::V6(address) => halves(address.octets()),
        };
        Traced {
            source: words(source),
            destination: words(destination),
            family: 4,
            protocol: 6,
            destination_port: 80,
            reason: Reason::PassPodGate as u32,
            ..Traced::default()
        }
    }

    #[test]
    fn flags_are_what_the_programs_compare_with() {
        let packet = packet("10.5.1.2", "10.5.2.9");
        for (line, expected) in [
            ("", true),
            ("10.5.1.2", true),
            ("10.5.2.77/24", true),
            ("10.5.3.0/24", false),
            ("10.5.2.9 10.5.1.2", true),
            ("10.5.2.9 10.5.2.9", false),
            ("0.0.0.0/0", true),
            ("::/0", true),
            ("fd00::/8", false),
            ("--port 80", true),
            ("--port=81", false),
            ("--proto tcp", true),
            ("--proto 6", true),
            ("--proto udp", false),
            ("--verdict pass", true),
            ("--verdict fast,drop", false),
            ("--verdict fast --verdict pass", true),
            ("--reason pass_pod_gate", true),
            ("--reason fast_encap,pass_pod_gate --verdict pass", true),
            ("--reason fast_encap", false),
        ] {
            assert_eq!(tracer(&args(line)).unwrap().wants(&packet), expected, "{line}");
        }
        let ipv6 = self::packet("fd00::2", "fd00::9");
        assert!(tracer(&args("fd00::/64")).unwrap().wants(&ipv6));
        assert!(!tracer(&args("0.0.0.0/0")).unwrap().wants(&ipv6), "IPv4 alone");
        assert_eq!(tracer(&args("--sample 100")).unwrap().every, 100);
    }

    #[test]
    fn a_wrong_value_is_named_with_what_would_be_right() {
        for (line, expected) in [
            ("10.5.1", &["10.5.1", "10.5.1.2", "10.5.1.0/24"][..]),
            ("10.5.1.0/33", &["10.5.1.0/33", "prefix"]),
            ("a b", &["'a'", "neither an address"]),
            ("10.5.1.1 10.5.1.2 10.5.1.3", &["10.5.1.3"]),
            ("--port 0", &["--port", "0", "1..=65535"]),
            ("--port http", &["--port", "http"]),
            ("--proto tpc", &["--proto", "tpc", "tcp, udp, icmp"]),
            ("--proto 256", &["--proto", "256", "0 to 255"]),
            ("--verdict slow", &["--verdict", "slow", "fast, pass, drop"]),
            ("--reason gate", &["--reason", "gate", "pass_pod_gate, pass_wire_gate"]),
            ("--reason nonsense", &["--reason", "nonsense", "fast_encap"]),
            ("--sample 0", &["--sample", "0"]),
            ("--count 0", &["--count", "0"]),
            ("--seconds -1", &["seconds"]),
        ] {
            let said = refusal(line);
            for word in expected {
                assert!(said.contains(word), "{line}: no {word:?} in {said:?}");
            }
            assert!(!said.contains('\n'), "{said}");
        }
        let nothing = tracer(&args("--verdict drop --reason fast_encap")).unwrap_err().to_string();
        assert!(nothing.contains("--verdict") && nothing.contains("--reason"), "{nothing}");
    }

    #[test]
    fn every_reason_belongs_to_the_verdict_that_its_name_begins_with() {
        assert_eq!(verdict_of(Reason::FastDecap), Verdict::Fast);
        assert_eq!(verdict_of(Reason::PassOverlay), Verdict::Pass);
        assert_eq!(verdict_of(Reason::DropUnknownVtep), Verdict::Drop);
        assert_eq!(verdict_of(Reason::NoteTranslated), Verdict::Note);
    }
}
