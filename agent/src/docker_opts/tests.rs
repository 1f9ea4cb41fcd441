//! The expected texts were taken from `mk-docker-opts.sh` of flannel v0.28, run by bash and by dash.

use clap::Parser;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: DockerOptsArgs,
}

fn args(words: &[&str]) -> DockerOptsArgs {
    Line::try_parse_from([&["docker-opts"], words].concat()).unwrap().args
}

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

const SUBNET: [(&str, &str); 4] = [
    ("FLANNEL_NETWORK", "10.5.0.0/16"),
    ("FLANNEL_SUBNET", "10.5.72.1/24"),
    ("FLANNEL_MTU", "1450"),
    ("FLANNEL_IPMASQ", "true"),
];

fn rendered(words: &[&str], more: &[(&str, &str)]) -> String {
    render(&args(words), &variables(&[&SUBNET[..], more].concat())).unwrap()
}

#[test]
fn without_options_each_and_all_are_written() {
    let all = "DOCKER_OPT_BIP=\"--bip=10.5.72.1/24\"\n\
               DOCKER_OPT_IPMASQ=\"--ip-masq=false\"\n\
               DOCKER_OPT_MTU=\"--mtu=1450\"\n\
               DOCKER_OPTS=\" --bip=10.5.72.1/24 --ip-masq=false --mtu=1450\"\n";
    assert_eq!(rendered(&[], &[]), all);
    assert_eq!(rendered(&["-i", "-c"], &[]), all);
}

#[test]
fn each_option_does_what_the_scripts_does() {
    assert_eq!(
        rendered(&["-i"], &[]),
        "DOCKER_OPT_BIP=\"--bip=10.5.72.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=false\"\nDOCKER_OPT_MTU=\"--mtu=1450\"\n"
    );
    assert_eq!(rendered(&["-c", "-m"], &[]), "DOCKER_OPTS=\" --bip=10.5.72.1/24 --mtu=1450\"\n");
    assert_eq!(
        rendered(&["-ck", "DOCKER_NETWORK_OPTIONS"], &[]),
        "DOCKER_NETWORK_OPTIONS=\" --bip=10.5.72.1/24 --ip-masq=false --mtu=1450\"\n"
    );
    assert_eq!(
        rendered(&["-c"], &[("FLANNEL_IPMASQ", "false")]),
        "DOCKER_OPTS=\" --bip=10.5.72.1/24 --ip-masq=true --mtu=1450\"\n"
    );
}

#[test]
fn a_lease_of_ipv6_alone_gives_no_bip() {
    let alone = [
        ("FLANNEL_IPV6_NETWORK", "fc00::/48"),
        ("FLANNEL_IPV6_SUBNET", "fc00:0:0:1::1/64"),
        ("FLANNEL_MTU", "1430"),
        ("FLANNEL_IPMASQ", "true"),
    ];
    assert_eq!(
        render(&args(&["--ipv6", "-c"]), &variables(&alone)).unwrap(),
        "DOCKER_OPTS=\" --fixed-cidr-v6=fc00:0:0:1::1/64 --ip-masq=false --ipv6 --mtu=1430\"\n"
    );
}

#[test]
fn ipv6_is_added_where_it_is_asked_for_and_there() {
    let dual = [("FLANNEL_IPV6_NETWORK", "fc00::/48"), ("FLANNEL_IPV6_SUBNET", "fc00:0:0:1::1/64")];
    assert_eq!(
        rendered(&["--ipv6"], &dual),
        "DOCKER_OPT_BIP=\"--bip=10.5.72.1/24\"\n\
         DOCKER_OPT_FIXED_CIDR_V6=\"--fixed-cidr-v6=fc00:0:0:1::1/64\"\n\
         DOCKER_OPT_IPMASQ=\"--ip-masq=false\"\n\
         DOCKER_OPT_IPV6=\"--ipv6\"\n\
         DOCKER_OPT_MTU=\"--mtu=1450\"\n\
         DOCKER_OPTS=\" --bip=10.5.72.1/24 --fixed-cidr-v6=fc00:0:0:1::1/64 --ip-masq=false --ipv6 --mtu=1450\"\n"
    );
    assert_eq!(rendered(&[], &dual), rendered(&[], &[]), "as the script, which has no IPv6");
    assert_eq!(rendered(&["--ipv6"], &[]), rendered(&[], &[]), "without a subnet there is nothing to give");
    assert_eq!(
        render(&args(&["-c", "--ipv6"]), &variables(&dual)).unwrap(),
        "DOCKER_OPTS=\" --fixed-cidr-v6=fc00:0:0:1::1/64 --ipv6\"\n"
    );
}

#[test]
fn options_of_the_environment_are_added_and_kept_in_front() {
    assert_eq!(
        rendered(&[], &[("DOCKER_OPTS", "--debug"), ("DOCKER_OPT_LOG", "--log-driver=journald")]),
        "DOCKER_OPT_BIP=\"--bip=10.5.72.1/24\"\n\
         DOCKER_OPT_IPMASQ=\"--ip-masq=false\"\n\
         DOCKER_OPT_LOG=\"--log-driver=journald\"\n\
         DOCKER_OPT_MTU=\"--mtu=1450\"\n\
         DOCKER_OPTS=\"--debug  --bip=10.5.72.1/24 --ip-masq=false --log-driver=journald --mtu=1450\"\n"
    );
    assert_eq!(
        rendered(&["-c"], &[("DOCKER_OPT_BIP", "--bip=9.9.9.9/24"), ("DOCKER_OPT_EMPTY", "")]),
        "DOCKER_OPTS=\" --bip=10.5.72.1/24  --ip-masq=false --mtu=1450\"\n"
    );
}

#[test]
fn an_option_of_several_words_stays_whole_where_the_script_falls_over_it() {
    assert_eq!(
        render(&args(&[]), &variables(&[("DOCKER_OPT_TWO", "--dns 192.0.2.53")])).unwrap(),
        "DOCKER_OPT_TWO=\"--dns 192.0.2.53\"\nDOCKER_OPTS=\" --dns 192.0.2.53\"\n"
    );
}

#[test]
fn without_a_subnet_an_empty_variable_is_written() {
    let directory = TempDir::new().unwrap();
    let docker = directory.path().join("docker.env");
    let words = ["-f", "/nonexistent/subnet.env", "-d", docker.to_str().unwrap()];
    run(&args(&words), Variables::new()).unwrap();
    assert_eq!(fs::read_to_string(&docker).unwrap(), "DOCKER_OPTS=\"\"\n");
    run(&args(&[&words[..], &["-i"]].concat()), Variables::new()).unwrap();
    assert_eq!(fs::read_to_string(&docker).unwrap(), "");
}

#[test]
fn the_file_overrules_the_environment() {
    let directory = TempDir::new().unwrap();
    let (subnet, docker) = (directory.path().join("subnet.env"), directory.path().join("docker.env"));
    // A documentation address, so that no route of this host is in the way.
    fs::write(&subnet, "FLANNEL_SUBNET=192.0.2.1/24\nexport DOCKER_OPT_X='--a b' # why\nrm -rf /\n").unwrap();
    let words = ["-f", subnet.to_str().unwrap(), "-d", docker.to_str().unwrap()];
    run(&args(&words), variables(&[("FLANNEL_SUBNET", "1.2.3.4/5"), ("FLANNEL_MTU", "1400")])).unwrap();
    assert_eq!(
        fs::read_to_string(&docker).unwrap(),
        "DOCKER_OPT_BIP=\"--bip=192.0.2.1/24\"\n\
         DOCKER_OPT_MTU=\"--mtu=1400\"\n\
         DOCKER_OPT_X=\"--a b\"\n\
         DOCKER_OPTS=\" --bip=192.0.2.1/24 --mtu=1400 --a b\"\n"
    );
}

#[test]
fn a_value_that_is_wrong_is_named_and_the_file_left_alone() {
    let directory = TempDir::new().unwrap();
    let docker = directory.path().join("docker.env");
    fs::write(&docker, "before").unwrap();
    let words = ["-f", "/nonexistent/subnet.env", "-d", docker.to_str().unwrap()];
    for (name, value) in [
        ("FLANNEL_SUBNET", "10.5.72.1"),
        ("FLANNEL_SUBNET", "$(reboot)"),
        ("FLANNEL_IPV6_SUBNET", "fc00::1"),
        ("FLANNEL_MTU", "big"),
        ("FLANNEL_IPMASQ", "yes"),
        ("DOCKER_OPT_X", "a\nEVIL=1"),
        ("DOCKER_OPTS", "a\nEVIL=1"),
    ] {
        let error = run(&args(&words), variables(&[(name, value)])).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{name}=")), "{error}");
        assert_eq!(fs::read_to_string(&docker).unwrap(), "before", "{name}");
    }
}

#[test]
fn a_link_to_a_device_is_written_through() {
    let directory = TempDir::new().unwrap();
    let (link, target) = (directory.path().join("link"), directory.path().join("target"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    run(&args(&["-f", "/nonexistent", "-d", link.to_str().unwrap()]), Variables::new()).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&target).unwrap(), "DOCKER_OPTS=\"\"\n");
}

#[test]
fn a_route_by_a_gateway_to_the_own_subnet_is_refused() {
    let line = |destination: [u8; 4], gateway: [u8; 4], mask: [u8; 4]| {
        let [destination, gateway, mask] =
            [destination, gateway, mask].map(|address| format!("{:08X}", u32::from_ne_bytes(address)));
        format!("eth0\t{destination}\t{gateway}\t0003\t0\t0\t0\t{mask}\t0\t0\t0 \n")
    };
    let table = [
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT \n".to_owned(),
        line([0; 4], [192, 0, 2, 1], [0; 4]),
        line([10, 5, 72, 0], [10, 5, 72, 0], [255, 255, 255, 0]),
        line([10, 5, 73, 0], [0; 4], [255, 255, 255, 0]),
        "broken\n".to_owned(),
    ]
    .concat();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("route");
    fs::write(&path, table).unwrap();
    let check = |subnet: &str| refuse_foreign_route(subnet.parse().unwrap(), &path, route);
    let error = check("10.5.72.1/24").unwrap_err();
    assert!(error.to_string().contains("10.5.72.0/24 via 10.5.72.0"), "{error}");
    check("10.5.73.1/24").unwrap();
    check("10.5.72.1/25").unwrap();
    check("10.5.74.1/24").unwrap();
}

proptest! {
    #[test]
    fn every_line_written_is_one_assignment(
        pairs in proptest::collection::btree_map("DOCKER_OPT_[A-Z]{1,3}|FLANNEL_(SUBNET|MTU|IPMASQ)|DOCKER_OPTS", ".{0,12}", 0..6),
        content in ".{0,60}",
    ) {
        let mut all = pairs;
        all.extend(assignments(&content));
        if let Ok(text) = render(&args(&[]), &all) {
            for line in text.lines() {
                let (name, _) = line.split_once("=\"").unwrap();
                prop_assert!(variable_name(name).is_ok());
                prop_assert!(line.ends_with('"'));
            }
        }
    }
}

#[test]
fn a_route_by_a_gateway_to_the_own_ipv6_subnet_is_refused() {
    let line = |destination: &str, length: &str, gateway: &str| {
        let [destination, gateway] =
            [destination, gateway].map(|it| format!("{:032x}", u128::from(it.parse::<Ipv6Addr>().unwrap())));
        let none = "0".repeat(32);
        format!("{destination} {length} {none} 00 {gateway} 00000400 00000001 00000000 00000001 eth0\n")
    };
    let table = [
        line("::", "00", "fd77::1"),
        line("fc00:0:0:1::", "40", "fc00:0:0:1::"),
        line("fc00:0:0:2::", "40", "::"),
        "broken\n".to_owned(),
    ]
    .concat();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ipv6_route");
    fs::write(&path, table).unwrap();
    let check = |subnet: &str| refuse_foreign_route(subnet.parse().unwrap(), &path, route6);
    let error = check("fc00:0:0:1::1/64").unwrap_err();
    assert!(error.to_string().contains("fc00:0:0:1::/64 via fc00:0:0:1::"), "{error}");
    check("fc00:0:0:2::1/64").unwrap();
    check("fc00:0:0:1::1/63").unwrap();
}
