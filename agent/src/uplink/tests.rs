use proptest::prelude::*;

use super::*;

fn plain(address: &str) -> CandidateAddress {
    let address: Ipv4Addr = address.parse().unwrap();
    CandidateAddress {
        address,
        link_local: address.is_link_local(),
        permanent: true,
        temporary: false,
        deprecated: false,
    }
}

fn interface(ifindex: u32, name: &str, addresses: &[&str]) -> Candidate {
    let addresses = addresses.iter().map(|address| plain(address)).collect();
    Candidate { ifindex, name: name.into(), mtu: 1500, addresses, addresses_v6: Vec::new() }
}

/// A host with a management and a data network, as Vagrant makes them.
fn host() -> Vec<Candidate> {
    vec![
        interface(1, "lo", &["127.0.0.1"]),
        interface(2, "eth0", &["10.0.2.15"]),
        interface(3, "eth1", &["192.168.56.11", "192.168.56.100"]),
        interface(4, "eth2", &[]),
        interface(5, "docker0", &["172.17.0.1"]),
    ]
}

const V4_ONLY: Families = Families { v4: true, v6: false };

fn by(default_route: Option<u32>) -> Ways {
    Ways { default_route, ..Ways::default() }
}

fn asked() -> UplinkChoice {
    UplinkChoice::default()
}

fn ifaces(ifaces: &[&str]) -> UplinkChoice {
    UplinkChoice { ifaces: ifaces.iter().map(|iface| (*iface).to_owned()).collect(), ..asked() }
}

fn regexes(regexes: &[&str]) -> UplinkChoice {
    UplinkChoice { iface_regex: regexes.iter().map(|regex| Regex::new(regex).unwrap()).collect(), ..asked() }
}

/// Name, VTEP address and public address of what is chosen on the host.
fn chosen(choice: &UplinkChoice) -> Result<(String, String, String), UplinkError> {
    let can_reach = Some((3, Ipv4Addr::new(192, 168, 56, 100).into()));
    let uplink = choose(choice, &host(), V4_ONLY, &Ways { can_reach, ..by(Some(2)) })?;
    Ok((uplink.name.clone(), uplink.own(), uplink.public()))
}

#[track_caller]
fn is_chosen(choice: &UplinkChoice, name: &str, address: &str) {
    assert_eq!(chosen(choice), Ok((name.into(), address.into(), address.into())));
}

#[test]
fn nothing_asked_for_takes_the_interface_of_the_default_route() {
    is_chosen(&asked(), "eth0", "10.0.2.15");
}

#[test]
fn no_default_route_is_an_error_that_lists_the_interfaces() {
    let error = choose(&asked(), &host(), V4_ONLY, &by(None)).unwrap_err();
    assert!(error.to_string().contains("eth1 (192.168.56.11 192.168.56.100)"), "{error}");
    assert!(
        choose(&asked(), &[], V4_ONLY, &by(Some(2))).unwrap_err().to_string().ends_with("there are none")
    );
}

#[test]
fn a_default_route_over_an_interface_without_address_or_mtu_says_so() {
    let error = choose(&asked(), &host(), V4_ONLY, &by(Some(4))).unwrap_err();
    assert!(error.to_string().contains("eth2, has no usable IPv4 address"), "{error}");
    let mut host = host();
    host[1].mtu = 0;
    let error = choose(&asked(), &host, V4_ONLY, &by(Some(2))).unwrap_err();
    assert!(error.to_string().contains("eth0, has an MTU of 0"), "{error}");
}

#[test]
fn an_interface_is_found_by_name_or_by_address() {
    is_chosen(&ifaces(&["eth1"]), "eth1", "192.168.56.11");
    is_chosen(&ifaces(&["192.168.56.100"]), "eth1", "192.168.56.100");
}

#[test]
fn the_first_interface_that_is_there_and_has_an_address_is_taken() {
    is_chosen(&ifaces(&["nope", "10.9.9.9", "eth2", "eth1", "eth0"]), "eth1", "192.168.56.11");
}

#[test]
fn what_was_asked_for_and_is_not_there_is_never_replaced_by_the_default_route() {
    let choice = UplinkChoice { ifaces: vec!["nope".into()], ..regexes(&["^wlan"]) };
    let error = chosen(&choice).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("--iface=nope or --iface-regex=^wlan") && text.contains("eth0 (10.0.2.15)"),
        "{text}"
    );
}

#[test]
fn a_regex_is_tried_on_all_addresses_before_any_name() {
    is_chosen(&regexes(&[r"^192\.168\."]), "eth1", "192.168.56.11");
    is_chosen(&regexes(&[r"\.100$"]), "eth1", "192.168.56.100");
    is_chosen(&regexes(&["^eth1$"]), "eth1", "192.168.56.11");
    is_chosen(&regexes(&["^eth2$|17"]), "docker0", "172.17.0.1");
    is_chosen(&regexes(&["^wlan", "^docker"]), "docker0", "172.17.0.1");
}

#[test]
fn a_regex_on_names_passes_over_interfaces_that_cannot_be_used() {
    is_chosen(&regexes(&["^(lo|eth2|eth1)$"]), "eth1", "192.168.56.11");
}

#[test]
fn names_come_before_regexes_and_regexes_before_reachability() {
    let reach = UplinkChoice { can_reach: Some(Ipv4Addr::new(192, 168, 56, 1).into()), ..asked() };
    is_chosen(&reach, "eth1", "192.168.56.100");
    is_chosen(&UplinkChoice { can_reach: reach.can_reach, ..regexes(&["^docker"]) }, "docker0", "172.17.0.1");
    is_chosen(
        &UplinkChoice { iface_regex: regexes(&["^docker"]).iface_regex, ..ifaces(&["eth0"]) },
        "eth0",
        "10.0.2.15",
    );
    is_chosen(&UplinkChoice { can_reach: reach.can_reach, ..ifaces(&["nope"]) }, "eth1", "192.168.56.100");
}

#[test]
fn an_unreachable_address_is_an_error() {
    let choice = UplinkChoice { can_reach: Some(Ipv4Addr::new(192, 0, 2, 1).into()), ..asked() };
    let error = choose(&choice, &host(), V4_ONLY, &by(Some(2))).unwrap_err();
    assert!(error.to_string().contains("--iface-can-reach=192.0.2.1"), "{error}");
    assert!(
        choose(
            &choice,
            &host(),
            V4_ONLY,
            &Ways { can_reach: Some((99, Ipv4Addr::new(10, 0, 0, 1).into())), ..by(Some(2)) }
        )
        .is_err()
    );
}

#[test]
fn a_public_address_alone_finds_the_interface_that_has_it() {
    let own = UplinkChoice { public_ip: Some(Ipv4Addr::new(192, 168, 56, 100)), ..asked() };
    is_chosen(&own, "eth1", "192.168.56.100");
    let foreign = UplinkChoice { public_ip: Some(Ipv4Addr::new(198, 51, 100, 1)), ..asked() };
    assert!(chosen(&foreign).unwrap_err().to_string().contains("--public-ip=198.51.100.1"));
}

#[test]
fn a_public_address_beside_an_interface_is_only_told_to_others() {
    let choice = UplinkChoice { public_ip: Some(Ipv4Addr::new(198, 51, 100, 1)), ..ifaces(&["eth1"]) };
    assert_eq!(chosen(&choice), Ok(("eth1".into(), "192.168.56.11".into(), "198.51.100.1".into())));
    let missing = UplinkChoice { public_ip: Some(Ipv4Addr::new(10, 0, 2, 15)), ..ifaces(&["nope"]) };
    assert!(chosen(&missing).is_err());
}

#[test]
fn the_best_address_is_global_then_permanent_then_lasting_and_never_deprecated() {
    let dynamic = CandidateAddress { permanent: false, ..plain("10.0.0.3") };
    let temporary = CandidateAddress { temporary: true, ..plain("10.0.0.4") };
    let deprecated = CandidateAddress { deprecated: true, ..plain("10.0.0.5") };
    let mut addresses =
        vec![plain("127.0.0.1"), deprecated, plain("169.254.0.1"), dynamic, temporary, plain("10.0.0.9")];
    for best in ["10.0.0.9", "10.0.0.4", "10.0.0.3", "169.254.0.1"] {
        let candidate = Candidate { addresses: addresses.clone(), ..interface(2, "eth0", &[]) };
        assert_eq!(best_address::<V4>(&candidate), Some(best.parse().unwrap()));
        addresses.retain(|entry| entry.address.to_string() != best);
    }
    assert_eq!(best_address::<V4>(&Candidate { addresses, ..interface(2, "eth0", &[]) }), None);
}

proptest! {
    #[test]
    fn what_is_chosen_is_there(
        names in proptest::collection::vec("[a-c]{1,2}", 0..3),
        links in proptest::collection::vec(("[a-c]{1,2}", 0u32..3, proptest::collection::vec(any::<u32>(), 0..3)), 0..5),
        default_route in proptest::option::of(0u32..6),
    ) {
        let candidates: Vec<Candidate> = links.into_iter().zip(1..).map(|((name, mtu, addresses), ifindex)| {
            let addresses = addresses.into_iter().map(|address| plain(&Ipv4Addr::from(address).to_string())).collect();
            Candidate { ifindex, name, mtu, addresses, addresses_v6: Vec::new() }
        }).collect();
        let choice = UplinkChoice { ifaces: names.clone(), ..asked() };
        if let Ok(uplink) = choose(&choice, &candidates, V4_ONLY, &by(default_route)) {
            let candidate = candidates.iter().find(|candidate| candidate.ifindex == uplink.ifindex).unwrap();
            prop_assert!(uplink.mtu != 0 && uplink.name == candidate.name);
            prop_assert!(candidate.addresses.iter().any(|entry| Some(entry.address) == uplink.address));
            prop_assert!(names.is_empty() || names.contains(&uplink.name));
            prop_assert!(!names.is_empty() || default_route == Some(uplink.ifindex));
        }
    }
}

fn entry_v6(address: &str, deprecated: bool, temporary: bool) -> CandidateAddress<V6> {
    let address: Ipv6Addr = address.parse().unwrap();
    let link_local = address.is_unicast_link_local();
    CandidateAddress::<V6> { address, link_local, permanent: !temporary, temporary, deprecated }
}

/// The same host with IPv6; `eth2` has nothing else.
fn dual_host() -> Vec<Candidate> {
    let mut host = host();
    host[1].addresses_v6 = vec![
        entry_v6("fe80::1", false, false),
        entry_v6("2001:db8::9", false, true),
        entry_v6("2001:db8::8", true, false),
        entry_v6("2001:db8::7", false, false),
    ];
    host[2].addresses_v6 = vec![entry_v6("fe80::2", false, false)];
    host[3].addresses_v6 = vec![entry_v6("fe80::3", false, false), entry_v6("fd77::3", false, false)];
    host
}

#[test]
fn the_ipv6_address_is_one_of_the_chosen_interface_that_others_reach() {
    let families = Families { v4: true, v6: true };
    let chosen = |choice: &UplinkChoice| choose(choice, &dual_host(), families, &by(Some(2)));
    let public = |choice: &UplinkChoice| chosen(choice).map(|uplink| uplink.public());
    assert_eq!(public(&asked()), Ok("10.0.2.15 and 2001:db8::7".into()));
    assert_eq!(public(&ifaces(&["2001:db8::9"])), Ok("10.0.2.15 and 2001:db8::9".into()));
    let elsewhere = UplinkChoice { public_ipv6: Some("2001:db8::1".parse().unwrap()), ..asked() };
    assert_eq!(public(&elsewhere), Ok("10.0.2.15 and 2001:db8::1".into()));
    assert_eq!(chosen(&elsewhere).unwrap().own(), "10.0.2.15 and 2001:db8::7");
    let link_local = UplinkError::NoIpv6 { name: "eth1".into() };
    assert_eq!(public(&ifaces(&["eth1"])), Err(link_local), "a link-local address is of no use to others");
}

#[test]
fn a_network_of_ipv6_alone_goes_by_ipv6_in_everything() {
    let families = Families { v4: false, v6: true };
    let can_reach = Some((4, "fd77::3".parse().unwrap()));
    let ways = Ways { default_route: Some(2), default_route_v6: Some(4), can_reach };
    let chosen = |choice: &UplinkChoice| {
        let uplink = choose(choice, &dual_host(), families, &ways)?;
        assert_eq!((uplink.address, uplink.public_ip), (None, None));
        Ok::<_, UplinkError>((uplink.name.clone(), uplink.own(), uplink.public()))
    };
    let is = |name: &str, own: &str, public: &str| Ok((name.into(), own.into(), public.into()));
    let address = |text: &str| Some(text.parse().unwrap());
    assert_eq!(chosen(&asked()), is("eth2", "fd77::3", "fd77::3"));
    assert_eq!(chosen(&ifaces(&["eth0"])), is("eth0", "2001:db8::7", "2001:db8::7"));
    assert_eq!(chosen(&ifaces(&["eth1", "2001:db8::9"])), is("eth0", "2001:db8::9", "2001:db8::9"));
    assert_eq!(chosen(&ifaces(&["10.0.2.15"])), is("eth0", "2001:db8::7", "2001:db8::7"));
    assert_eq!(chosen(&regexes(&["^fd77:"])), is("eth2", "fd77::3", "fd77::3"));
    let reach = UplinkChoice { can_reach: Some("fd00::1".parse().unwrap()), ..asked() };
    assert_eq!(chosen(&reach), is("eth2", "fd77::3", "fd77::3"));
    assert_eq!(
        chosen(&UplinkChoice { public_ipv6: address("2001:db8::9"), ..asked() }),
        is("eth0", "2001:db8::9", "2001:db8::9")
    );
    let told = UplinkChoice { public_ipv6: address("2001:db8::1"), ..ifaces(&["eth2"]) };
    assert_eq!(chosen(&told), is("eth2", "fd77::3", "2001:db8::1"));
    let foreign = UplinkChoice { public_ipv6: address("2001:db8::1"), ..asked() };
    assert!(chosen(&foreign).unwrap_err().to_string().contains("--public-ipv6=2001:db8::1"));
    assert!(chosen(&ifaces(&["eth1"])).is_err(), "link-local alone");
    let error = choose(&asked(), &dual_host(), families, &by(Some(2))).unwrap_err().to_string();
    assert!(error.contains("no IPv6 default route") && error.contains("eth2 (fe80::3 fd77::3)"), "{error}");
}
