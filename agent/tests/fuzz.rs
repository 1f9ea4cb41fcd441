//! Hostile input for everything that parses what others wrote: each file of the corpus as it is, then changed at
//! random. An input that ever broke a parser belongs into the corpus, `tests/corpus/<parser>/`
//! (that of the CNI plugin's input would be `tests/corpus/cni/`).
//!
//! A parser may refuse, in one printable line of bounded length, or understand: then writing what it understood
//! and reading that gives the same again. More rounds: `PROPTEST_CASES=1000000 cargo test --test fuzz`.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their helpers"
)]

use std::{fs, path::Path};

use loden_agent::{
    family::Family,
    lease::{LeaseAttrs, LeaseKey},
    network::{NetworkConfig, Pool},
    subnet_file::{self, SubnetFile},
};
use loden_ebpf::{
    ethernet,
    family::{Family as _, V4},
    flow, ipv4, vxlan,
};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestRunner},
};

/// The longest that an error may be, in bytes: it goes into the log, once for every record that causes it.
const LONGEST_ERROR: usize = 1024;
/// Cases for each parser, unless `PROPTEST_CASES` says otherwise.
const CASES: u32 = 4000;

/// One change of an input.
#[derive(Clone, Debug)]
enum Mutation {
    /// Turn bits of a byte over.
    Flip(Index, u8),
    /// Take bytes out.
    Delete(Index, usize),
    /// Say bytes again, so many times.
    Repeat(Index, usize, usize),
    /// Put these bytes in.
    Insert(Index, Vec<u8>),
    /// Go on as another input does.
    Splice(Index, Index, Index),
    /// Put a number in the place of one.
    Number(Index, u64),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<Index>;
    let word = prop::sample::select(vec![
        "null", "true", "{", "}", "[", "]", "\"", "\\", "\\u0000", ":", ",", "/", "-", "&", "=", "\n", "\0",
        ".", "::", "255", "-1", "1e999", "\u{202e}", "\u{feff}", "export ", "'",
    ]);
    let numbers = prop::sample::select(vec![
        0,
        1,
        4,
        7,
        8,
        15,
        24,
        28,
        31,
        32,
        33,
        64,
        128,
        255,
        256,
        65_535,
        65_536,
        16_777_215,
        16_777_216,
        u64::MAX,
    ]);
    prop_oneof![
        (at(), 1u8..).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
        (at(), 1..20usize).prop_map(|(at, len)| Mutation::Delete(at, len)),
        (at(), 1..20usize, 1..200usize).prop_map(|(at, len, times)| Mutation::Repeat(at, len, times)),
        (at(), word).prop_map(|(at, word)| Mutation::Insert(at, word.as_bytes().to_vec())),
        (at(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (at(), at(), at()).prop_map(|(at, other, from)| Mutation::Splice(at, other, from)),
        (at(), numbers).prop_map(|(at, number)| Mutation::Number(at, number)),
    ]
}

impl Mutation {
    fn apply(&self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        // One more than there is: the end is a place too.
        let place = |at: &Index, len: usize| at.index(len + 1);
        let len = input.len();
        match self {
            Self::Flip(at, bits) => {
                if let Some(byte) = input.get_mut(place(at, len)) {
                    *byte ^= bits;
                }
            }
            Self::Delete(at, count) => {
                let at = place(at, len);
                input.drain(at..len.min(at + count));
            }
            Self::Repeat(at, count, times) => {
                let at = place(at, len);
                let again = input[at..len.min(at + count)].repeat(*times);
                input.splice(at..at, again);
            }
            Self::Insert(at, bytes) => {
                let at = place(at, len);
                input.splice(at..at, bytes.iter().copied());
            }
            Self::Splice(at, other, from) => {
                let other = &corpus[other.index(corpus.len())];
                input.truncate(place(at, len));
                input.extend_from_slice(&other[place(from, other.len())..]);
            }
            Self::Number(at, number) => {
                let starts: Vec<usize> = (0..len)
                    .filter(|&i| input[i].is_ascii_digit() && (i == 0 || !input[i - 1].is_ascii_digit()))
                    .collect();
                let Some(&start) = starts.get(at.index(starts.len().max(1))) else { return };
                let end = (start..len).find(|&i| !input[i].is_ascii_digit()).unwrap_or(len);
                input.splice(start..end, number.to_string().into_bytes());
            }
        }
    }
}

/// Every file of the corpus of a parser, in the order of their names.
fn corpus(parser: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(parser);
    let mut paths: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", directory.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Gives `check` the corpus, and changed inputs; it panics where something is wrong.
fn fuzz(parser: &str, cases: u32, check: impl Fn(&[u8])) {
    let corpus = corpus(parser);
    corpus.iter().for_each(|input| check(input));
    let mut config = Config::with_cases(cases);
    // Found inputs go into the corpus, for every parser and every tool to see.
    config.failure_persistence = None;
    if let Some(cases) = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()) {
        config.cases = cases;
    }
    let changed = (any::<Index>(), prop::collection::vec(mutation(), 1..6));
    let outcome = TestRunner::new(config).run(&changed, |(seed, mutations)| {
        let mut input = corpus[seed.index(corpus.len())].clone();
        for mutation in &mutations {
            mutation.apply(&mut input, &corpus);
        }
        check(&input);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{parser}: {error}");
    }
}

/// What goes into the log is one line that a terminal can show.
fn assert_tellable(error: &dyn std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an error without words");
    assert!(text.len() <= LONGEST_ERROR, "an error of {} bytes: {text:.200}", text.len());
    assert!(!text.chars().any(char::is_control), "control characters in an error: {text:?}");
}

/// What the config says of a family, written as it is in etcd.
fn keys_of<F: Family>(pool: &Pool<F>, of: &str) -> String {
    let Pool { network, subnet_len, subnet_min, subnet_max } = pool;
    for base in [subnet_min, subnet_max] {
        let subnet = F::net(*base, *subnet_len).unwrap();
        assert!(F::covers(*network, subnet) && pool.allows(subnet), "{subnet} of {pool:?}");
    }
    format!(
        r#""{of}Network":"{network}","{of}SubnetLen":{subnet_len},"{of}SubnetMin":"{subnet_min}","{of}SubnetMax":"{subnet_max}""#
    )
}

#[test]
fn network_configs() {
    fuzz("network", CASES, |input| {
        let text = String::from_utf8_lossy(input);
        let config = match NetworkConfig::parse(&text) {
            Ok(config) => config,
            Err(error) => return assert_tellable(&error),
        };
        let keys = [
            config.v4.as_ref().map(|pool| keys_of(pool, "")),
            config.v6.as_ref().map(|pool| keys_of(pool, "IPv6")),
            Some(format!(r#""EnableIPv4":{},"EnableIPv6":{}"#, config.v4.is_some(), config.v6.is_some())),
        ];
        let keys: Vec<String> = keys.into_iter().flatten().collect();
        let again = NetworkConfig::parse(&format!("{{{}}}", keys.join(","))).unwrap();
        assert_eq!(again, NetworkConfig { backend: again.backend.clone(), ..config });
    });
}

#[test]
fn lease_keys() {
    fuzz("key", CASES, |input| {
        let text = String::from_utf8_lossy(input);
        match text.parse::<LeaseKey>() {
            Ok(key) => assert_eq!(key.to_string(), text, "one subnet, one key"),
            Err(error) => assert_tellable(&error),
        }
        let _ = loden_agent::lease::subnets_in_flannels_eyes(&text);
    });
}

#[test]
fn lease_values() {
    fuzz("value", CASES, |input| {
        let attrs = match LeaseAttrs::parse(input) {
            Ok(attrs) => attrs,
            Err(error) => return assert_tellable(&error),
        };
        assert_eq!(LeaseAttrs::parse(attrs.to_json().as_bytes()).unwrap(), attrs);
        match attrs.vtep() {
            Ok(vtep) => {
                let again = LeaseAttrs::of_type("vxlan").with_v4([192, 0, 2, 1].into(), Some(vtep));
                assert_eq!(again.vtep().unwrap(), vtep);
            }
            Err(error) => assert_tellable(&error),
        }
    });
}

#[test]
fn subnet_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("subnet.env");
    fuzz("subnet_env", CASES / 4, |input| {
        fs::write(&path, input).unwrap();
        let (v4, v6) = (subnet_file::previous_ipv4(&path), subnet_file::previous_ipv6(&path));
        for error in [v4.as_ref().err(), v6.as_ref().err()].into_iter().flatten() {
            assert_tellable(error);
        }
        // No agent has a subnet without a host in it.
        let v4 = v4.ok().flatten().filter(|(_, subnet)| subnet.prefix_len() <= 30);
        let v6 = v6.ok().flatten().filter(|(_, subnet)| subnet.prefix_len() <= 126);
        if v4.is_some() || v6.is_some() {
            let file = SubnetFile { v4, v6, mtu: 1450, ip_masq: false };
            fs::write(&path, file.to_string()).unwrap();
            assert_eq!(subnet_file::previous_ipv4(&path).unwrap(), v4);
            assert_eq!(subnet_file::previous_ipv6(&path).unwrap(), v6);
        }
    });
}

/// Takes a frame apart as the programs do: outer IPv4, UDP and VXLAN, inner Ethernet and IPv4.
#[test]
fn frames() {
    fuzz("frame", CASES, |input| {
        let Some((outer, rest)) = input.split_first_chunk::<{ ipv4::LEN }>() else { return };
        look_at_ipv4(outer, rest);
        let Some((headers, rest)) = rest.split_first_chunk::<16>() else { return };
        if let Some(vni) = vxlan::vni(headers) {
            assert!(vni < 1 << 24);
            assert_eq!(vni, vxlan::vni_field(headers));
        }
        let Some((inner, rest)) = rest.split_first_chunk::<{ ethernet::LEN }>() else { return };
        let mut changed = *inner;
        ethernet::set_macs(&mut changed, ethernet::source(inner), ethernet::destination(inner));
        assert_eq!(ethernet::source(&changed), ethernet::destination(inner));
        assert_eq!(ethernet::ether_type(&changed), ethernet::ether_type(inner));
        let Some((packet, rest)) = rest.split_first_chunk::<{ ipv4::LEN }>() else { return };
        look_at_ipv4(packet, rest);
    });
}

fn look_at_ipv4(header: &ipv4::Header, rest: &[u8]) {
    if ipv4::is_plain(header) {
        assert_eq!(ipv4::header_len(header), ipv4::LEN);
    }
    assert!(!ipv4::is_later_fragment(header) || ipv4::is_fragment(header));
    if ipv4::is_plain(header) && ipv4::has_right_checksum(header) && ipv4::ttl(header) > 1 {
        let mut hop = *header;
        ipv4::decrement_ttl(&mut hop);
        ipv4::set_ecn(&mut hop, 3);
        assert!(ipv4::has_right_checksum(&hop), "{header:02x?} became {hop:02x?}");
        assert_eq!(ipv4::ttl(&hop), ipv4::ttl(header) - 1);
        assert_eq!(
            (ipv4::source(&hop), ipv4::destination(&hop)),
            (ipv4::source(header), ipv4::destination(header))
        );
    }
    let Some(next) = rest.first_chunk() else { return };
    assert_eq!(V4::ports(header, next).is_some(), V4::has_ports(header, next));
    if let Some(beyond) = rest[next.len()..].first_chunk() {
        let mut hop = *header;
        ipv4::decrement_ttl(&mut hop);
        assert_eq!(
            flow::mark::<V4>(header, next, *beyond, || [0; 12]),
            flow::mark::<V4>(&hop, next, *beyond, || [0; 12]),
            "a hop does not make another packet of it"
        );
    }
}
