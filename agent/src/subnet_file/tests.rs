use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

fn ours() -> SubnetFile {
    let (network, subnet) = (net("10.5.0.0/16"), net("10.5.72.0/24"));
    SubnetFile { v4: Some((network, subnet)), v6: None, mtu: 1450, ip_masq: true }
}

/// As flanneld v0.28 writes it.
const FLANNELS: &str =
    "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

fn with(content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("subnet.env");
    fs::write(&path, content).unwrap();
    (directory, path)
}

#[test]
fn the_file_is_flannels_to_the_byte() {
    assert_eq!(ours().to_string(), FLANNELS);
}

#[test]
fn a_dual_stack_file_is_flannels_to_the_byte_and_read_back() {
    let v6 = Some(("fc00::/48".parse().unwrap(), "fc00:0:0:1::/64".parse().unwrap()));
    let text = SubnetFile { v6, mtu: 1430, ..ours() }.to_string();
    assert_eq!(
        text,
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_IPV6_NETWORK=fc00::/48\n\
         FLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    );
    let (_directory, path) = with(&text);
    assert_eq!(previous_ipv6_subnet(&path).unwrap(), v6.map(|(_, subnet)| subnet));
    assert_eq!(previous_subnet(&path).unwrap(), Some(net("10.5.72.0/24")));
    let alone = SubnetFile { v4: None, v6, mtu: 1430, ..ours() }.to_string();
    assert_eq!(
        alone,
        "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    );
    let (_directory, path) = with(&alone);
    assert_eq!((previous_ipv4(&path).unwrap(), previous_ipv6(&path).unwrap()), (None, v6));
    let (_directory, path) = with("FLANNEL_IPV6_SUBNET=10.5.72.1/24\n");
    let error = previous_ipv6_subnet(&path).unwrap_err().to_string();
    assert!(error.contains("FLANNEL_IPV6_SUBNET=10.5.72.1/24 must be an IPv6 address"), "{error}");
}

#[test]
fn host_bits_are_dropped_and_the_bridge_has_the_first_address() {
    let file = SubnetFile { v4: Some((net("10.5.3.4/16"), net("10.5.72.77/26"))), ip_masq: false, ..ours() };
    assert_eq!(
        file.to_string(),
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.65/26\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
}

#[test]
fn directory_and_file_are_made_readable_for_all() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("run/flannel/subnet.env");
    assert!(ours().write(&path).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), FLANNELS);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o755);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn the_file_is_left_alone_while_it_says_the_same() {
    let (_directory, path) = with(FLANNELS);
    let before = fs::metadata(&path).unwrap();
    assert!(!ours().write(&path).unwrap());
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    assert!(SubnetFile { mtu: 1400, ..ours() }.write(&path).unwrap());
    assert_ne!(fs::metadata(&path).unwrap().ino(), before.ino(), "replaced, not written into");
}

#[test]
fn a_symbolic_link_is_replaced_and_what_it_points_to_is_not_touched() {
    let (directory, target) = with("precious\n");
    let link = directory.path().join("link.env");
    symlink(&target, &link).unwrap();
    assert!(ours().write(&link).unwrap());
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious\n");
    assert_eq!(fs::read_to_string(&link).unwrap(), FLANNELS);
}

#[test]
fn a_pipe_socket_or_directory_is_never_replaced() {
    let directory = TempDir::new().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let socket = directory.path().join("socket");
    let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [&pipe, &socket, &directory.path().to_owned()] {
        let before = fs::symlink_metadata(path).unwrap().mode();
        let error = ours().write(path).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        assert_eq!(fs::symlink_metadata(path).unwrap().mode(), before);
    }
}

#[test]
fn an_error_names_the_file() {
    let (_directory, path) = with("");
    let below = path.join("subnet.env");
    assert!(ours().write(&below).unwrap_err().to_string().contains(below.to_str().unwrap()));
}

#[test]
fn the_subnet_that_flannel_wrote_is_read_back() {
    let (_directory, path) = with(FLANNELS);
    assert_eq!(previous_subnet(&path).unwrap(), Some(net("10.5.72.0/24")));
    assert_eq!(previous_network(&path).unwrap(), Some(net("10.5.0.0/16")));
}

#[test]
fn other_ways_to_write_the_same_are_understood() {
    for content in [
        "FLANNEL_SUBNET=\"10.5.72.1/24\"",
        "export FLANNEL_SUBNET='10.5.72.1/24'\r\n",
        "\n# old\nFLANNEL_SUBNET=1.2.3.4/5\n  FLANNEL_SUBNET= 10.5.72.1/24 \n",
        "FLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_SUBNETS=x\n",
    ] {
        let (_directory, path) = with(content);
        assert_eq!(previous_subnet(&path).unwrap(), Some(net("10.5.72.0/24")), "{content}");
    }
}

#[test]
fn no_file_and_no_subnet_mean_no_previous_subnet() {
    assert_eq!(previous_subnet(Path::new("/nonexistent/subnet.env")).unwrap(), None);
    for content in ["", "FLANNEL_SUBNET=\n", "FLANNEL_SUBNET=\"\"", "# FLANNEL_SUBNET=10.5.72.1/24", "\0\0\0"]
    {
        let (_directory, path) = with(content);
        assert_eq!(previous_subnet(&path).unwrap(), None, "{content:?}");
    }
}

#[test]
fn what_is_no_subnet_is_refused_by_name_in_one_short_line() {
    for value in [
        "10.5.72.1",
        "10.5.72.1/33",
        "fc00::1/64",
        "$(reboot)",
        "10.5.1.1/24,10.5.2.1/24",
        "\u{1b}[2J",
        "\u{fffd}",
    ] {
        let (_directory, path) = with(format!("FLANNEL_SUBNET={value}{}\n", "x".repeat(1000)));
        let error = previous_subnet(&path).unwrap_err().to_string();
        assert!(error.contains("FLANNEL_SUBNET=") && error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.len() < 1000 && !error.contains(char::is_control), "{error:?}");
    }
}

#[test]
fn reading_neither_waits_nor_fills_memory() {
    let (directory, _) = with("");
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    for path in [&pipe, Path::new("/dev/zero"), directory.path()] {
        assert!(previous_subnet(path).is_err(), "{}", path.display());
    }
    let (_directory, large) = with(vec![b'\n'; LARGEST as usize + 1]);
    assert!(matches!(previous_subnet(&large), Err(SubnetFileError::NotASubnetFile { .. })));
}

proptest! {
    // Each case waits for the disk.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_written_is_read_back(network in any::<u32>(), length in 8u8..=28, add in 2u8..=4, subnet in any::<u32>(), mtu in any::<u16>(), ip_masq in any::<bool>()) {
        let network = Ipv4Net::new(network.into(), length).unwrap();
        let subnet = Ipv4Net::new(subnet.into(), length + add - 2).unwrap();
        let file = SubnetFile { v4: Some((network, subnet)), v6: None, mtu, ip_masq };
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("subnet.env");
        prop_assert!(file.write(&path).unwrap());
        prop_assert_eq!(previous_subnet(&path).unwrap(), Some(subnet.trunc()));
        prop_assert_eq!(previous_network(&path).unwrap(), Some(network.trunc()));
        let content = fs::read_to_string(&path).unwrap();
        let mtu = mtu.to_string();
        prop_assert_eq!(entry(&content, "FLANNEL_MTU"), Some(mtu.as_str()));
        prop_assert!(!file.write(&path).unwrap());
    }

    #[test]
    fn no_content_makes_it_panic(content in proptest::collection::vec(any::<u8>(), 0..200), value in ".{0,40}") {
        let (_directory, path) = with([content, format!("\nFLANNEL_SUBNET={value}").into_bytes()].concat());
        let _ = previous_subnet(&path);
    }
}
