use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{Config, Datapath, Gate, LogFormat, SourceCheck, Xdp};

fn parse_with(args: &[&str], env: &[(&str, &str)]) -> Result<Command, Exit> {
    let env: BTreeMap<&str, &str> = env.iter().copied().collect();
    parse(args.iter().map(OsString::from), &|name| env.get(name).map(|value| (*value).to_owned()))
}

fn agent_with(args: &[&str], env: &[(&str, &str)]) -> AgentArgs {
    match parse_with(&[&["loden", "agent"], args].concat(), env) {
        Ok(Command::Agent(args)) => args,
        other => panic!("{other:?}"),
    }
}

fn agent(args: &[&str]) -> AgentArgs {
    agent_with(args, &[])
}

fn config(args: &[&str]) -> Config {
    Config::from_args(agent(args)).unwrap()
}

/// The line that the program ends with.
fn refused_with(args: &[&str], env: &[(&str, &str)]) -> String {
    let exit = match parse_with(&[&["loden", "agent"], args].concat(), env) {
        Err(exit) => exit,
        Ok(Command::Agent(args)) => Exit::error(Config::from_args(args).unwrap_err()),
        Ok(other) => panic!("{other:?}"),
    };
    assert_eq!(exit.code, 2, "{}", exit.text);
    assert!(!exit.text.contains(char::is_control), "more than a line: {:?}", exit.text);
    exit.text
}

fn refused(args: &[&str]) -> String {
    refused_with(args, &[])
}

#[test]
fn without_flags_everything_is_as_in_flannel() {
    let config = config(&[]);
    assert_eq!(config.etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
    assert_eq!(config.etcd.prefix, "/coreos.com/network");
    assert_eq!((&config.etcd.key_file, &config.etcd.cert_file, &config.etcd.ca_file), (&None, &None, &None));
    assert_eq!((&config.etcd.username, &config.etcd.password), (&None, &None));
    assert!(config.uplink.ifaces.is_empty() && config.uplink.iface_regex.is_empty());
    assert_eq!((config.uplink.can_reach, config.uplink.public_ip), (None, None));
    assert_eq!(config.subnet_file, Path::new("/run/flannel/subnet.env"));
    assert_eq!(config.lease_ttl, Duration::from_secs(24 * 3600));
    assert_eq!(config.renew_margin, Duration::from_secs(3600));
    assert!(!config.ip_masq && config.ip_masq_fully_random && config.forward_rules);
    assert_eq!(config.healthz, None);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn without_flags_our_own_settings_have_the_documented_defaults() {
    let config = config(&[]);
    assert_eq!((config.datapath, config.gate, config.xdp), (Datapath::Auto, Gate::Strict, Xdp::Off));
    assert_eq!(config.source_check, SourceCheck::Drop);
    assert_eq!(config.run_dir, Path::new("/run/loden"));
    assert_eq!(config.bpffs_dir, Path::new("/sys/fs/bpf/loden"));
    assert_eq!((config.metrics_addr, config.log.format), (None, LogFormat::Human));
    assert_eq!((config.log.verbosity, config.log.directives), (0, None));
}

/// Every flag of flannel v0.28, with a value other than its default.
const FLANNEL: [(&str, &str); 31] = [
    ("etcd-endpoints", "https://192.0.2.1:2379"),
    ("etcd-prefix", "/other"),
    ("etcd-keyfile", "/k.pem"),
    ("etcd-certfile", "/c.pem"),
    ("etcd-cafile", "/ca.pem"),
    ("etcd-username", "flannel"),
    ("etcd-password", "hunter2"),
    ("iface", "eth1"),
    ("iface-regex", "^eth"),
    ("iface-can-reach", "192.0.2.7"),
    ("subnet-file", "/tmp/other.env"),
    ("public-ip", "198.51.100.1"),
    ("public-ipv6", "2001:db8::1"),
    ("subnet-lease-renew-margin", "30"),
    ("ip-masq", "true"),
    ("ip-masq-fully-random-disable", "true"),
    ("kube-subnet-mgr", "true"),
    ("kube-api-url", "https://192.0.2.1:6443"),
    ("kubeconfig-file", "/kubeconfig"),
    ("kube-annotation-prefix", "example.com"),
    ("net-config-path", "/net-conf.json"),
    ("set-node-network-unavailable", "false"),
    ("healthz-ip", "127.0.0.1"),
    ("healthz-port", "8080"),
    ("iptables-resync", "60"),
    ("iptables-forward-rules", "false"),
    ("ip-blackhole-route", "true"),
    ("v", "4"),
    ("vmodule", "vxlan=4"),
    ("log_backtrace_at", "main.go:1"),
    ("version", "false"),
];

/// Compares by what is printed: `AgentArgs` holds regular expressions, which have no equality.
fn shown(args: &AgentArgs) -> String {
    format!("{args:?}")
}

#[test]
fn each_flag_of_flannel_is_accepted_in_each_of_gos_spellings_and_has_an_effect() {
    let untouched = shown(&agent(&[]));
    for (name, value) in FLANNEL {
        let spelled: Vec<String> =
            ["-", "--"].iter().map(|dashes| shown(&agent(&[&format!("{dashes}{name}={value}")]))).collect();
        assert_eq!(spelled[0], spelled[1], "{name}");
        if name != "version" {
            assert_ne!(spelled[0], untouched, "{name}");
        }
        if !matches!(value, "true" | "false") {
            assert_eq!(shown(&agent(&[&format!("-{name}"), value])), spelled[0], "{name}");
            assert_eq!(shown(&agent(&[&format!("--{name}"), value])), spelled[0], "{name}");
        }
    }
}

#[test]
fn each_flag_of_flannel_is_read_from_its_variable() {
    for (name, value) in FLANNEL.iter().filter(|(name, _)| *name != "version") {
        let variable = format!("FLANNELD_{}", name.replace('-', "_").to_uppercase());
        assert_eq!(
            shown(&agent_with(&[], &[(&variable, value)])),
            shown(&agent(&[&format!("--{name}={value}")])),
            "{variable}"
        );
    }
}

#[test]
fn each_of_our_flags_is_read_from_its_variable() {
    let own = [
        ("datapath", "kernel"),
        ("gate", "open"),
        ("xdp", "generic"),
        ("source-check", "pass"),
        ("run-dir", "/run/other"),
        ("bpffs-dir", "/sys/fs/bpf/other"),
        ("metrics-addr", "127.0.0.1:9100"),
        ("subnet-lease-ttl", "90m"),
        ("log", "debug"),
        ("log-format", "json"),
    ];
    let untouched = shown(&agent(&[]));
    for (name, value) in own {
        let variable = format!("LODEN_{}", name.replace('-', "_").to_uppercase());
        let flag = shown(&agent(&[&format!("-{name}"), value]));
        assert_ne!(flag, untouched, "{name}");
        assert_eq!(shown(&agent_with(&[], &[(&variable, value)])), flag, "{variable}");
    }
}

#[test]
fn booleans_follow_gos_rules() {
    for yes in
        ["-ip-masq", "--ip-masq", "-ip-masq=true", "-ip-masq=1", "-ip-masq=t", "-ip-masq=T", "--ip-masq=TRUE"]
    {
        assert!(agent(&[yes]).ip_masq, "{yes}");
    }
    for no in ["false", "0", "f", "F", "FALSE", "False"] {
        assert!(!agent(&[&format!("-iptables-forward-rules={no}")]).iptables_forward_rules, "{no}");
        assert!(!agent_with(&[], &[("FLANNELD_IPTABLES_FORWARD_RULES", no)]).iptables_forward_rules, "{no}");
    }
    assert!(agent(&["-ip-masq=false", "-ip-masq"]).ip_masq, "the last one counts");
    let line = refused(&["-ip-masq=yes"]);
    assert!(line.contains("'yes'") && line.contains("--ip-masq") && line.contains("true or false"), "{line}");
}

#[test]
fn a_word_after_a_boolean_is_refused_with_the_right_spelling() {
    assert_eq!(
        refused(&["-ip-masq", "true", "-iface=eth1"]),
        "loden: unexpected word 'true' after --ip-masq; write --ip-masq=true"
    );
}

#[test]
fn a_value_may_begin_with_a_dash_unless_it_is_a_flag() {
    assert_eq!(agent(&["-etcd-password", "-x-"]).etcd.etcd_password.unwrap().expose(), "-x-");
    let line = refused(&["-iface", "-ip-masq"]);
    assert!(line.contains("--iface needs a value") && line.contains("-ip-masq"), "{line}");
    assert!(refused(&["-iface"]).contains("--iface needs a value"));
}

#[test]
fn two_dashes_alone_end_the_flags_and_nothing_may_follow() {
    let env = [("FLANNELD_IFACE", "eth1")];
    assert_eq!(agent_with(&["-ip-masq", "--"], &env).uplink.iface, ["eth1"]);
    assert_eq!(refused(&["--", "-ip-masq"]), "loden: unexpected word '-ip-masq' after --");
}

#[test]
fn values_may_hold_equals_signs() {
    assert_eq!(agent(&["-etcd-password=a=b="]).etcd.etcd_password.unwrap().expose(), "a=b=");
}

#[test]
fn repeatable_flags_keep_their_order() {
    assert_eq!(
        agent(&["-iface=eth1", "--iface", "10.0.0.1", "-iface=eth0"]).uplink.iface,
        ["eth1", "10.0.0.1", "eth0"]
    );
}

#[test]
fn klogs_verbosity_is_taken_in_both_spellings() {
    for args in [&["-v=3"][..], &["-v", "3"], &["--v=3"], &["--v", "3"]] {
        assert_eq!(agent(args).verbosity, 3, "{args:?}");
    }
    assert_eq!(agent(&["-v=-1"]).verbosity, -1);
}

#[test]
fn the_first_place_that_gives_a_flag_counts() {
    let all = [
        ("FLANNEL_OPTIONS", "-etcd-prefix=/options"),
        ("FLANNELD_ETCD_PREFIX", "/flanneld"),
        ("FLANNEL_ETCD_PREFIX", "/packaged"),
        ("FLANNEL_ETCD_KEY", "/packaged-of-old"),
    ];
    let prefix = |args: &[&str], env: &[(&str, &str)]| agent_with(args, env).etcd.etcd_prefix;
    assert_eq!(prefix(&["-etcd-prefix=/line"], &all), "/line");
    assert_eq!(prefix(&[], &all), "/options");
    assert_eq!(prefix(&[], &all[1..]), "/flanneld");
    assert_eq!(prefix(&[], &all[2..]), "/packaged");
    assert_eq!(prefix(&[], &all[3..]), "/packaged-of-old");
    assert_eq!(prefix(&[], &[]), "/coreos.com/network");
}

#[test]
fn a_packaged_environment_file_works_as_it_is() {
    let args = agent_with(
        &[],
        &[
            ("FLANNEL_ETCD", "http://192.0.2.1:2379,http://192.0.2.2:2379"),
            ("FLANNEL_ETCD_KEY", "/atomic.io/network"),
            ("FLANNEL_OPTIONS", " -iface=eth2 --ip-masq  -subnet-file '/run/my flannel/subnet.env'"),
        ],
    );
    let config = Config::from_args(args).unwrap();
    assert_eq!(config.etcd.endpoints, ["http://192.0.2.1:2379", "http://192.0.2.2:2379"]);
    assert_eq!(config.etcd.prefix, "/atomic.io/network");
    assert_eq!(config.uplink.ifaces, ["eth2"]);
    assert!(config.ip_masq);
    assert_eq!(config.subnet_file, Path::new("/run/my flannel/subnet.env"));
}

#[test]
fn a_repeatable_flag_is_taken_from_one_place_only() {
    let env = [("FLANNEL_OPTIONS", "-iface=eth1 -iface=eth2"), ("FLANNELD_IFACE", "eth3")];
    assert_eq!(agent_with(&["-iface=eth0"], &env).uplink.iface, ["eth0"]);
    assert_eq!(agent_with(&[], &env).uplink.iface, ["eth1", "eth2"]);
    assert_eq!(agent_with(&[], &env[1..]).uplink.iface, ["eth3"]);
}

#[test]
fn a_variable_is_not_looked_at_when_the_flag_is_given() {
    assert!(agent_with(&["-ip-masq"], &[("FLANNELD_IP_MASQ", "rubbish")]).ip_masq);
}

#[test]
fn empty_values_are_as_good_as_none_where_flannels_default_is_empty() {
    let args = agent_with(
        &["-public-ip=", "-etcd-cafile", "", "-iface="],
        &[("FLANNELD_PUBLIC_IP", "192.0.2.9"), ("FLANNELD_ETCD_PREFIX", ""), ("FLANNEL_OPTIONS", "")],
    );
    assert_eq!(args.uplink.public_ip, None, "given on the command line, so the variable does not count");
    assert!(args.uplink.iface.is_empty() && args.etcd.etcd_cafile.is_none());
    assert_eq!(args.etcd.etcd_prefix, "/coreos.com/network");
    assert!(refused(&["-etcd-endpoints="]).contains("--etcd-endpoints"));
    assert!(refused(&["-ip-masq="]).contains("--ip-masq"));
}

#[test]
fn an_error_in_a_variable_names_the_variable() {
    for (name, value) in [
        ("FLANNELD_IP_MASQ", "maybe"),
        ("FLANNELD_HEALTHZ_PORT", "65536"),
        ("FLANNELD_PUBLIC_IP", "localhost"),
        ("FLANNEL_ETCD", "ftp://192.0.2.1:21"),
        ("FLANNEL_ETCD_KEY", "coreos.com/network"),
        ("FLANNEL_OPTIONS", "-healthz-port=x"),
        ("FLANNEL_OPTIONS", "-iface 'eth0"),
        ("FLANNEL_OPTIONS", "-no-such-flag"),
        ("LODEN_DATAPATH", "fast"),
    ] {
        let line = refused_with(&[], &[(name, value)]);
        assert!(line.starts_with(&format!("loden: {name}: ")), "{line}");
    }
}

#[test]
fn an_unknown_flag_is_refused_with_the_one_that_was_meant() {
    let line = refused(&["-etcd-endpoint=http://192.0.2.1:2379"]);
    assert!(line.contains("--etcd-endpoint'") && line.contains("'--etcd-endpoints'"), "{line}");
}

#[test]
fn a_password_is_in_no_message() {
    assert!(!refused(&["--etcd-pasword=hunter2"]).contains("hunter2"));
    assert!(!refused(&["-etcd-password=hunter2", "-bad"]).contains("hunter2"));
    for url in ["http://u:hunter2@192.0.2.1:2379", "u:hunter2@etcd:2379", "https://u:hun,ter2@x/,http://y:1"]
    {
        let line = refused(&["--etcd-endpoints", url]);
        assert!(!line.contains("hunter2"), "{line}");
        assert!(line.contains("--etcd-endpoints"), "{line}");
    }
    let args = agent(&["-etcd-username=u", "-etcd-password=hunter2"]);
    assert!(!format!("{args:?}").contains("hunter2"));
    assert!(!format!("{:?}", Config::from_args(args).unwrap()).contains("hunter2"));
}

#[test]
fn a_hostile_word_cannot_drive_the_terminal_or_add_a_line() {
    let line = refused(&["-\u{1b}[2Jx\nUsage: y"]);
    assert!(!line.contains('\u{1b}'), "{line:?}");
}

#[test]
fn called_as_flanneld_it_is_the_agent() {
    let parsed = parse_with(&["/opt/bin/flanneld", "-iface=eth7"], &[]).unwrap();
    assert!(matches!(parsed, Command::Agent(args) if args.uplink.iface == ["eth7"]));
    assert!(parse_with(&["loden", "-iface=eth7"], &[]).is_err());
}

#[test]
fn help_and_version_end_with_code_0_in_both_spellings() {
    for args in [
        &["loden", "--help"][..],
        &["loden", "-help"],
        &["loden", "-h"],
        &["loden", "help"],
        &["loden", "agent", "-help"],
        &["loden", "agent", "--help=true"],
        &["flanneld", "--help"],
        &["loden", "cleanup", "--help"],
        &["loden", "docker-opts", "--help"],
    ] {
        let exit = parse_with(args, &[]).unwrap_err();
        assert!(exit.code == 0 && exit.text.contains("Usage: loden"), "{args:?}: {exit:?}");
    }
    for args in [
        &["loden", "-version"][..],
        &["loden", "-V"],
        &["flanneld", "-version"],
        &["loden", "agent", "--version"],
    ] {
        let exit = parse_with(args, &[]).unwrap_err();
        assert_eq!(exit, Exit { text: format!("loden {}", env!("CARGO_PKG_VERSION")), code: 0 }, "{args:?}");
    }
}

#[test]
fn no_command_and_an_unknown_one_are_refused_in_a_line() {
    for args in [&["loden"][..], &[], &["loden", "agnet"], &["loden", ""], &["loden", "-iface", "x"]] {
        let exit = parse_with(args, &[]).unwrap_err();
        assert!(exit.code == 2 && exit.text.lines().count() == 1, "{args:?}: {exit:?}");
    }
}

#[test]
fn the_help_shows_only_flags_that_do_something() {
    let help = parse_with(&["loden", "agent", "--help"], &[]).unwrap_err().text;
    for (name, _) in FLANNEL.iter().filter(|(name, _)| *name != "version") {
        let does_nothing =
            ["iptables-resync", "ip-blackhole-route", "vmodule", "log_backtrace_at"].contains(name);
        let shown =
            help.lines().any(|line| line.split([' ', '[', ',']).any(|word| word == format!("--{name}")));
        assert_eq!(shown, !does_nothing, "{name}");
    }
}

#[test]
fn cleanup_takes_the_agents_flags_and_environment() {
    let env = [("FLANNEL_OPTIONS", "-iface=eth1 -ip-masq -healthz-port=8080"), ("FLANNEL_ETCD_KEY", "/x")];
    let parsed = parse_with(&["loden", "cleanup", "-keep-kernel", "--run-dir", "/run/two"], &env).unwrap();
    let Command::Cleanup(args) = parsed else { panic!("{parsed:?}") };
    assert!(args.keep_kernel);
    assert_eq!((args.agent.uplink.iface, args.agent.etcd.etcd_prefix), (vec!["eth1".into()], "/x".into()));
    assert_eq!(args.agent.run_dir, Path::new("/run/two"));
    let help = parse_with(&["loden", "cleanup", "--help"], &[]).unwrap_err().text;
    assert!(
        help.contains("--keep-kernel") && help.contains("--etcd-prefix") && !help.contains("--healthz-port")
    );
}

#[test]
fn status_finds_the_agent_by_the_agents_own_settings() {
    let run_dir =
        |args: &[&str], env: &[(&str, &str)]| match parse_with(&[&["loden", "status"], args].concat(), env) {
            Ok(Command::Status(args)) => (args.json, args.run_dir.to_str().unwrap().to_owned()),
            other => panic!("{other:?}"),
        };
    let options =
        [("FLANNEL_OPTIONS", "-iface=eth1 -run-dir=/run/options"), ("LODEN_RUN_DIR", "/run/variable")];
    assert_eq!(run_dir(&[], &[]), (false, "/run/loden".into()));
    assert_eq!(run_dir(&[], &options[1..]), (false, "/run/variable".into()));
    assert_eq!(run_dir(&["-json"], &options), (true, "/run/options".into()));
    assert_eq!(run_dir(&["--json", "-run-dir", "/run/line"], &options), (true, "/run/line".into()));
    assert!(parse_with(&["loden", "status", "-iface=eth1"], &[]).is_err());
}

#[test]
fn docker_opts_takes_the_scripts_options() {
    let parsed =
        parse_with(&["loden", "docker-opts", "-ic", "-kKEY", "-f", "/a", "-d/b", "-m", "rest"], &[]).unwrap();
    let Command::DockerOpts(args) = parsed else { panic!("{parsed:?}") };
    assert!(args.individual && args.combined && args.no_ip_masq);
    assert_eq!(
        (args.combined_key.as_str(), args.subnet_file, args.docker_file),
        ("KEY", "/a".into(), "/b".into())
    );
}

#[test]
fn a_line_is_split_as_a_shell_would() {
    let split = |line| words::split_line(line).unwrap();
    assert_eq!(split(""), Vec::<String>::new());
    assert_eq!(split("  a\tb\nc "), ["a", "b", "c"]);
    assert_eq!(split(r#"a'b c'"d  e"\ f"#), ["ab cd  e f"]);
    assert_eq!(split(r#""a\"b\\c\d" '\' '' """#), [r#"a"b\c\d"#, r"\", "", ""]);
    for broken in ["'", "a\"", "\\", "\"\\"] {
        assert!(words::split_line(broken).is_err(), "{broken}");
    }
}

/// Words that come near to being right, and words that do not.
fn word() -> impl Strategy<Value = String> {
    let name = proptest::sample::select(FLANNEL.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let value = proptest::sample::select(vec![
        "",
        "true",
        "-1",
        "0",
        "99999999999999999999",
        "h",
        "1h",
        "http://",
        "[::1]:1",
        "%",
    ]);
    prop_oneof![
        (
            proptest::sample::select(vec!["-", "--", "---", ""]),
            name,
            proptest::sample::select(vec!["", "=", "=="]),
            value
        )
            .prop_map(|(dashes, name, equals, value)| format!("{dashes}{name}{equals}{value}")),
        ".{0,12}",
        "-{0,3}[a-z=]{0,6}",
    ]
}

proptest! {
    #[test]
    fn no_command_line_or_environment_makes_it_panic(
        first in proptest::sample::select(vec!["agent", "cleanup", "docker-opts", "help", "-v"]),
        args in proptest::collection::vec(word(), 0..6),
        options in proptest::option::of(".{0,30}"),
        value in proptest::option::of(".{0,20}"),
    ) {
        let args = ["loden".to_owned(), first.to_owned()].into_iter().chain(args).map(OsString::from);
        let env = |name: &str| if name == "FLANNEL_OPTIONS" { options.clone() } else { value.clone() };
        match parse(args, &env) {
            Ok(Command::Agent(args)) => { let _ = Config::from_args(args); }
            Ok(_) => {}
            Err(exit) if exit.code == 0 => {}
            Err(exit) => {
                prop_assert_eq!(exit.code, 2);
                prop_assert!(!exit.text.contains(char::is_control), "{:?}", exit.text);
            }
        }
    }

    #[test]
    fn words_that_are_not_utf8_do_not_make_it_panic(args in proptest::collection::vec(proptest::collection::vec(1u8.., 0..10), 0..5)) {
        use std::os::unix::ffi::OsStringExt as _;
        let args = args.into_iter().map(OsString::from_vec);
        let _ = parse([OsString::from("loden"), "agent".into()].into_iter().chain(args), &|_| None);
    }

    #[test]
    fn splitting_takes_back_what_quoting_made(words in proptest::collection::vec("[^\u{0}]{0,8}", 0..5)) {
        let line = words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect::<Vec<_>>().join(" ");
        prop_assert_eq!(words::split_line(&line).unwrap(), words);
    }

    #[test]
    fn both_spellings_of_a_value_mean_the_same(value in "[a-z0-9.]{1,15}") {
        let joined = agent(&[&format!("-iface={value}")]);
        let apart = agent(&["--iface", &value]);
        prop_assert_eq!(joined.uplink.iface, apart.uplink.iface);
    }
}
