//! Containers of two engines reach each other, with their own addresses, by the fast path.

use loden_tests::traffic::{hello, ping};

use crate::{Fleet, assert_fast, wait_for_endpoints};

#[test]
fn containers_of_two_engines_reach_each_other_with_their_own_addresses_by_the_fast_path() {
    let fleet = Fleet::start(&[]);
    let [a, b] = fleet.pair();
    for (node, container) in fleet.cluster.nodes.iter().zip([&a, &b]) {
        let env = node.subnet_env().unwrap();
        assert!(env.subnet().contains(&container.address()), "{} on {}", container.address(), env.subnet());
        let mtu = container.netns().ip("link show eth0").unwrap();
        assert!(mtu.contains(&format!(" mtu {} ", env.mtu)), "{mtu}");
        wait_for_endpoints(node, &[container.address()]);
    }
    assert_fast(&fleet.cluster.nodes, &a, &b);
    // A neighbour on the same bridge, and the outside.
    let neighbour = fleet.engines[0].run("").unwrap();
    assert_eq!(hello(neighbour.host(), a.host(), None).unwrap(), neighbour.address());
    ping(a.netns(), fleet.cluster.underlay().address(1).unwrap(), 2).unwrap();
}
