//! The built program's command line: what it prints where, and how it exits.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

/// Runs the program without any of our own environment variables.
fn loden(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loden"));
    command.env_clear().args(args);
    command
}

/// The one line on standard error of a program that ends with 2.
fn refused(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let line = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{line}");
    assert!(stdout.is_empty());
    assert!(line.starts_with("loden: ") && line.ends_with('\n') && line.lines().count() == 1, "{line:?}");
    line
}

#[test]
fn a_wrong_flag_ends_it_with_2_and_a_line_that_names_the_flag() {
    for (args, named) in [
        (&["agent", "-no-such-flag"][..], "--no-such-flag"),
        (&["agent", "-healthz-port=x"], "--healthz-port"),
        (&["agent", "-datapath", "fast"], "auto, ebpf, kernel"),
        (&["agent", "-etcd-prefix=x"], "/coreos.com/network"),
        (&["agent", "-kube-api-url=x"], "--kube-api-url"),
        (&["agent", "-etcd-certfile=/c"], "--etcd-keyfile"),
        (&["cleanup", "-bad"], "--bad"),
        (&["docker-opts", "-z"], "-z"),
        (&["no-such-command"], "no-such-command"),
        (&[], "loden agent"),
    ] {
        let line = refused(&mut loden(args));
        assert!(line.contains(named), "{args:?}: {line}");
    }
}

#[test]
fn a_wrong_variable_ends_it_with_2_and_a_line_that_names_the_variable() {
    let line = refused(loden(&["agent"]).env("FLANNELD_PUBLIC_IP", "nowhere"));
    assert!(line.contains("FLANNELD_PUBLIC_IP") && line.contains("'nowhere'"), "{line}");
}

#[test]
fn a_variable_that_is_not_utf8_is_refused_and_not_passed_over() {
    let line = refused(loden(&["agent"]).env("FLANNELD_PUBLIC_IP", OsStr::from_bytes(b"\xff")));
    assert!(line.contains("FLANNELD_PUBLIC_IP"), "{line}");
}

#[test]
fn called_as_flanneld_it_takes_the_agents_flags() {
    let line = refused(loden(&["-healthz-port=x"]).arg0("/usr/bin/flanneld"));
    assert!(line.contains("--healthz-port"), "{line}");
}

#[test]
fn words_that_are_not_utf8_are_refused_in_a_line() {
    let word = OsStr::from_bytes(b"-iface=\xff\xfe");
    assert!(refused(loden(&["agent"]).arg(word)).contains("UTF-8"));
}

#[test]
fn help_and_version_are_printed_on_standard_output() {
    for (flag, expected) in [("-help", "Usage: loden <COMMAND>"), ("-version", env!("CARGO_PKG_VERSION"))] {
        let Output { status, stdout, stderr } = loden(&[flag]).output().unwrap();
        assert!(status.success() && stderr.is_empty());
        assert!(String::from_utf8(stdout).unwrap().contains(expected), "{flag}");
    }
}

#[test]
fn the_script_of_flannel_is_replaced_by_docker_opts() {
    let directory = tempfile::TempDir::new().unwrap();
    let subnet = directory.path().join("subnet.env");
    std::fs::write(&subnet, "FLANNEL_SUBNET=192.0.2.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n").unwrap();
    let output = loden(&["docker-opts", "-d", "/dev/stdout", "-c", "-f"]).arg(&subnet).output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "DOCKER_OPTS=\" --bip=192.0.2.1/24 --ip-masq=true --mtu=1450\"\n"
    );
    std::fs::write(&subnet, "FLANNEL_IPMASQ=perhaps\n").unwrap();
    let output = loden(&["docker-opts", "-d", "/dev/stdout", "-f"]).arg(&subnet).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "as the script");
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "loden: FLANNEL_IPMASQ=perhaps must be true or false\n"
    );
}

#[test]
fn bash_completes_commands_and_flags_from_the_script() {
    let complete = |words: &str| {
        let mut backwards = words.split(' ').rev();
        let (current, previous) = (backwards.next().unwrap(), backwards.next().unwrap());
        let index = words.split(' ').count() - 1;
        let script = format!(
            "source <({} completions bash); COMP_WORDS=({words}); COMP_CWORD={index}; \
             _loden loden '{current}' '{previous}'; echo \"${{COMPREPLY[@]}}\"",
            env!("CARGO_BIN_EXE_loden")
        );
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("loden stat"), "status");
    assert_eq!(complete("loden agent --etcd-endp"), "--etcd-endpoints");
    assert_eq!(complete("loden agent --gate str"), "strict");
}

#[test]
fn every_shell_gets_a_script_that_knows_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = loden(&["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        for command in ["agent", "status", "cleanup", "docker-opts"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    assert!(refused(&mut loden(&["completions", "tcsh"])).contains("bash"));
}

#[test]
fn the_manual_has_a_page_for_each_command_that_tells_of_its_flags() {
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    let output = loden(&["man"]).arg(&pages).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let page = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap();
    let whole = page("loden.1");
    assert!(whole.contains(".TH loden 1") && whole.contains(".SH NAME"), "{whole}");
    for command in ["agent", "status", "cleanup", "docker-opts", "completions", "man"] {
        assert!(whole.contains(&format!("loden\\-{}(1)", command.replace('-', "\\-"))), "{command}: {whole}");
        assert!(page(&format!("loden-{command}.1")).contains(".SH SYNOPSIS"), "{command}");
    }
    // In roff a hyphen that must stay one is written with a backslash.
    let agent = page("loden-agent.1");
    for flag in ["--etcd-endpoints", "--iface", "--gate"] {
        assert!(agent.contains(&flag.replace('-', "\\-")), "{flag}");
    }
    assert!(!agent.contains("iptables\\-resync"), "hidden flags stay hidden");
}
