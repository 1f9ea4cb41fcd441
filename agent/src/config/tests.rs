use std::net::{Ipv4Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::cli::{self, Command};
use crate::config::etcd::Endpoint;
use crate::config::flag_value::{duration, lease_ttl};

fn config(flags: &[&str]) -> Result<Config, ConfigError> {
    let args = ["loden", "agent"].iter().chain(flags).map(std::ffi::OsString::from);
    match cli::parse(args, &|_| None) {
        Ok(Command::Agent(args)) => Config::from_args(args),
        other => panic!("{other:?}"),
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    text.parse::<Endpoint>().map(|endpoint| endpoint.url(false))
}

#[test]
fn endpoints_become_urls_of_scheme_host_and_port() {
    for (text, url) in [
        ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
        ("https://etcd-1.example_corp.com:2379/", "https://etcd-1.example_corp.com:2379"),
        ("HTTP://host:1", "http://host:1"),
        (" http://host:1 ", "http://host:1"),
        ("host:2379", "http://host:2379"),
        ("[::1]:2379", "http://[::1]:2379"),
        ("https://[2001:db8::1]:65535", "https://[2001:db8::1]:65535"),
    ] {
        assert_eq!(endpoint(text).as_deref(), Ok(url), "{text}");
    }
}

#[test]
fn what_is_no_endpoint_is_refused_with_what_would_be_right() {
    for text in [
        "",
        "http://",
        "://",
        "host",
        "http://host",
        "[::1]",
        "http://[::1]",
        "::1",
        "ftp://host:1",
        "unix:///run/etcd",
        "http://host:0",
        "http://host:65536",
        "http://host:x",
        "http://host:+1",
        "http://host:1/v3",
        "http://host:1?a",
        "http://a b:1",
        "http://:1",
        "http://[::g]:1",
        "http://user:pw@host:1",
        "http://h\u{f6}st:1",
        "http://[::1:1",
    ] {
        let reason = endpoint(text).unwrap_err();
        assert!(reason.contains("HOST:") || reason.contains("--etcd-username"), "{text}: {reason}");
    }
}

#[test]
fn an_endpoint_without_a_scheme_uses_tls_when_there_are_tls_files() {
    let config = config(&["-etcd-endpoints=a:1,http://b:2", "-etcd-cafile=/ca.pem"]).unwrap();
    assert_eq!(config.etcd.endpoints, ["https://a:1", "http://b:2"]);
    let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
    assert!(warning.contains("http://b:2") && !warning.contains("https://a:1"), "{warning}");
}

#[test]
fn tls_files_with_plain_endpoints_are_told() {
    let tls = config(&["-etcd-keyfile=/k", "-etcd-certfile=/c"]).unwrap();
    assert_eq!(tls.etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
    assert!(tls.warnings[0].contains("http://127.0.0.1:2379"), "{:?}", tls.warnings);
    let ca_alone = config(&["-etcd-endpoints=https://a:1", "-etcd-cafile=/ca"]).unwrap();
    assert_eq!(ca_alone.warnings, Vec::<String>::new());
}

#[test]
fn a_certificate_needs_its_key_and_a_key_its_certificate() {
    let error = config(&["-etcd-certfile=/c"]).unwrap_err();
    assert_eq!(error.to_string(), "--etcd-certfile=/c needs --etcd-keyfile beside it");
    let error = config(&["-etcd-keyfile=/k"]).unwrap_err();
    assert_eq!(error.to_string(), "--etcd-keyfile=/k needs --etcd-certfile beside it");
}

#[test]
fn a_user_without_a_password_is_told_and_not_used() {
    let alone = config(&["-etcd-username=u"]).unwrap();
    assert_eq!((alone.etcd.username, alone.etcd.password), (None, None));
    assert!(alone.warnings[0].contains("--etcd-password"));
    let both = config(&["-etcd-username=u", "-etcd-password=p"]).unwrap();
    assert_eq!(both.etcd.username.as_deref(), Some("u"));
    assert_eq!(both.etcd.password.unwrap().expose(), "p");
    assert_eq!(both.warnings, Vec::<String>::new());
}

#[test]
fn the_prefix_begins_with_a_slash_and_ends_without_one() {
    for (text, prefix) in [
        ("/coreos.com/network", "/coreos.com/network"),
        ("/coreos.com/network/", "/coreos.com/network"),
        ("//a///b//", "/a/b"),
        ("/", ""),
    ] {
        assert_eq!(etcd::prefix(text).as_deref(), Ok(prefix), "{text}");
    }
    for text in ["", "coreos.com/network", "/a/../b", "/a/.", "/a\nb", "/a\0"] {
        assert!(etcd::prefix(text).is_err(), "{text:?}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let error = config(&["-iface=2001:db8::1/64"]).unwrap_err();
    assert_eq!((error.flag, error.value.as_str()), ("iface", "2001:db8::1/64"));
    assert_eq!(config(&["-iface=2001:db8::1"]).unwrap().uplink.ifaces, ["2001:db8::1"]);
}

#[test]
fn what_has_no_effect_is_told_in_one_warning() {
    let quiet =
        config(&["-iptables-resync=5", "-set-node-network-unavailable=true", "-ip-blackhole-route=false"]);
    assert_eq!(quiet.unwrap().warnings, Vec::<String>::new());
    let config = config(&["-iptables-resync=10", "-vmodule=a=1"]).unwrap();
    let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
    assert!(warning.ends_with(": --iptables-resync, --vmodule"), "{warning}");
}

#[test]
fn the_kubernetes_flags_count_with_the_switch_only() {
    let flags = [
        "-kube-api-url=https://h",
        "-kubeconfig-file=/k",
        "-kube-annotation-prefix=a.b/c",
        "-net-config-path=/n",
    ];
    let on =
        config(&[&flags[..], &["-kube-subnet-mgr", "-set-node-network-unavailable=false"]].concat()).unwrap();
    assert_eq!(on.warnings, Vec::<String>::new());
    let kube = on.kube.unwrap();
    assert_eq!((kube.api_url.as_deref(), kube.annotation_prefix.as_str()), (Some("https://h"), "a.b/c-"));
    assert_eq!((kube.kubeconfig, kube.net_config), (Some("/k".into()), "/n".into()));
    assert!(!kube.set_condition);
    let off = config(&flags).unwrap();
    assert_eq!(off.kube, None);
    let [warning] = &off.warnings[..] else { panic!("{:?}", off.warnings) };
    assert!(
        warning.ends_with("--kube-api-url, --kubeconfig-file, --kube-annotation-prefix, --net-config-path"),
        "{warning}"
    );
    let plain = config(&["-kube-subnet-mgr"]).unwrap().kube.unwrap();
    assert_eq!(plain.annotation_prefix, "flannel.alpha.coreos.com/");
    assert!(plain.set_condition && plain.net_config.ends_with("kube-flannel/net-conf.json"));
}

#[test]
fn an_interface_has_a_name_that_the_kernel_would_take() {
    assert!(config(&["-iface=123456789012345"]).is_ok());
    for name in ["1234567890123456", "a b", "a/b", "300.1.2.3/24"] {
        assert_eq!(config(&[&format!("-iface={name}")]).unwrap_err().flag, "iface", "{name}");
    }
}

#[test]
fn the_health_address_is_made_of_ip_and_port() {
    let healthz = |flags: &[&str]| config(flags).unwrap().healthz;
    assert_eq!(healthz(&["-healthz-ip=127.0.0.1"]), None);
    assert_eq!(healthz(&["-healthz-port=8080"]), Some(SocketAddr::from(([0, 0, 0, 0], 8080))));
    assert_eq!(
        healthz(&["-healthz-ip=::1", "-healthz-port=80"]),
        Some(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 80)))
    );
}

#[test]
fn the_renewal_margin_leaves_half_of_the_lease() {
    let minutes =
        |flags: &[&str]| config(flags).map(|config| (config.renew_margin.as_secs(), config.warnings.len()));
    assert_eq!(minutes(&["-subnet-lease-renew-margin=30"]), Ok((1800, 0)));
    assert_eq!(minutes(&["-subnet-lease-ttl=1m"]), Ok((30, 0)), "the default gives way in silence");
    assert_eq!(minutes(&["-subnet-lease-ttl=1h", "-subnet-lease-renew-margin=45"]), Ok((1800, 1)));
}

#[test]
fn durations_are_read_as_go_writes_them() {
    for (text, seconds) in [
        ("24h", 86400),
        ("90m", 5400),
        ("3600s", 3600),
        ("1h30m", 5400),
        ("1h0m5s", 3605),
        ("0s", 0),
        ("1h5s", 3605),
    ] {
        assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
    }
    for text in [
        "",
        "24",
        "h",
        "1.5h",
        "-1h",
        "1m1h",
        "1h1h",
        "1d",
        "24h ",
        "99999999999999999999h",
        "9999999999999999999h",
        "\u{661}h",
    ] {
        assert!(duration(text).unwrap_err().contains("such as 24h"), "{text}");
    }
}

#[test]
fn a_lease_lasts_from_five_seconds_to_a_year() {
    assert!(lease_ttl("5s").is_ok() && lease_ttl("8760h").is_ok());
    assert!(lease_ttl("4s").unwrap_err().contains("at least 5s"));
    assert!(lease_ttl("8760h1s").unwrap_err().contains("at most 8760h"));
}

#[test]
fn paths_are_checked_for_what_they_are_to_be() {
    use flag_value::{directory, file};
    assert_eq!(directory("/run/loden/"), Ok("/run/loden".into()));
    for text in ["", "run/loden", "/", "/run/../etc", "/a\0"] {
        assert!(directory(text).is_err(), "{text:?}");
    }
    assert!(file("subnet.env").is_ok() && file("/run/x").is_ok());
    for text in ["", "/", "/run/", "..", "/run/.", "a\0b"] {
        assert!(file(text).is_err(), "{text:?}");
    }
}

#[test]
fn addresses_are_those_of_hosts() {
    use flag_value::{ipv4_address, socket_address};
    assert_eq!(ipv4_address("192.0.2.1"), Ok(Ipv4Addr::new(192, 0, 2, 1)));
    for text in ["", "0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "host", "1.2.3", "01.2.3.4"] {
        assert!(ipv4_address(text).unwrap_err().contains("IPv4 address"), "{text}");
    }
    assert_eq!(socket_address(":9100"), Ok(SocketAddr::from(([0, 0, 0, 0], 9100))));
    for text in ["", "9100", "127.0.0.1", "127.0.0.1:0", "host:1", ":70000"] {
        assert!(socket_address(text).is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn no_value_makes_a_parser_panic(text in "\\PC{0,20}|[0-9hms]{0,25}|[a-z:/.\\[\\]@0-9]{0,20}") {
        let _ = endpoint(&text);
        let _ = etcd::prefix(&text);
        let _ = lease_ttl(&text);
        let _ = flag_value::boolean(&text);
        let _ = flag_value::file(&text);
        let _ = flag_value::directory(&text);
        let _ = flag_value::socket_address(&text);
        let _ = flag_value::log_directives(&text);
        let _ = flag_value::regex(&text);
    }

    #[test]
    fn a_filter_of_the_log_in_any_script_is_an_error(text in "[ =,a-z\u{2000}\u{3a3}]{0,4}\u{2000}\u{3a3}=") {
        prop_assert!(flag_value::log_directives(&text).is_err());
    }

    #[test]
    fn an_accepted_endpoint_is_accepted_again_as_itself(text in "(https?://)?[a-z.\\[\\]:0-9]{1,12}:[0-9]{1,5}/?") {
        if let Ok(url) = endpoint(&text) {
            prop_assert_eq!(endpoint(&url), Ok(url.clone()));
        }
    }

    #[test]
    fn a_duration_is_read_back_as_it_was_written(seconds in 0u64..400 * 24 * 3600) {
        let text = format!("{}h{}m{}s", seconds / 3600, seconds / 60 % 60, seconds % 60);
        prop_assert_eq!(duration(&text), Ok(Duration::from_secs(seconds)));
    }
}
