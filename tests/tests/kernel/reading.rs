//! What is read over netlink is what the tools show.

use std::{net::Ipv4Addr, time::Duration};

use loden_agent::{
    family::V4,
    kernel::{AddressScope, FdbOf, LinkKind, NeighbourState, RouteKind, mac_text},
};
use loden_tests::netns::Netns;

use crate::{inside, json, node};

#[test]
fn links_are_as_ip_shows_them() {
    let (a, _b) = node::pair();
    let _pod = node::pod(&a, "10.5.1.0/24");
    a.ip("link add flannel.7 type vxlan id 7 dev eth0 local 192.168.77.11 dstport 4789 gbp learning")
        .unwrap();
    a.ip("link set eth0 mtu 1400").unwrap();

    let links = inside(&a, async |kernel| kernel.links().await.unwrap());

    let shown = json(&a, "ip -j -d link show");
    assert_eq!(links.len(), shown.as_array().unwrap().len());
    for (link, shown) in links.iter().zip(shown.as_array().unwrap()) {
        assert_eq!(u64::from(link.index), shown["ifindex"]);
        assert_eq!(link.name, shown["ifname"]);
        assert_eq!(u64::from(link.mtu), shown["mtu"]);
        assert_eq!(link.mac.map(mac_text).unwrap(), shown["address"]);
        let flag = |flag: &str| shown["flags"].as_array().unwrap().iter().any(|it| it == flag);
        assert_eq!((link.up, link.carrier, link.loopback), (flag("UP"), flag("LOWER_UP"), flag("LOOPBACK")));
    }
    let named = |name: &str| links.iter().find(|link| link.name == name).unwrap();
    assert_eq!(named("eth0").kind, LinkKind::Veth);
    assert!(named("eth0").peer_in_other_netns.is_some());
    assert_eq!(named("cni0").kind, LinkKind::Bridge);
    assert_eq!(named("vethpod").master, Some(named("cni0").index));
    assert_eq!(named("lo").kind, LinkKind::Physical);
    let LinkKind::Vxlan(vxlan) = named("flannel.7").kind else { panic!("flannel.7 is a VXLAN device") };
    assert_eq!((vxlan.vni, vxlan.port, vxlan.gbp, vxlan.learning), (7, 4789, true, true));
    assert_eq!((vxlan.local, vxlan.uplink), (Some([192, 168, 77, 11].into()), Some(named("eth0").index)));
}

#[test]
fn a_link_is_found_by_name_and_index_or_not_at_all() {
    let netns = Netns::create("links").unwrap();
    inside(&netns, async |kernel| {
        let lo = kernel.link_by_name("lo").await.unwrap().unwrap();
        assert_eq!(kernel.link_by_index(lo.index).await.unwrap(), Some(lo));
        assert_eq!(kernel.link_by_name("nowhere").await.unwrap(), None);
        assert_eq!(kernel.link_by_index(4711).await.unwrap(), None);
        let error = kernel.link_by_name("a-name-that-is-too-long").await.unwrap_err();
        assert!(error.to_string().contains("1 to 15 bytes"), "{error}");
    });
}

#[test]
fn addresses_are_as_ip_shows_them() {
    let (a, _b) = node::pair();
    a.ip("addr add 192.168.77.99/24 dev eth0").unwrap();
    a.ip("addr add 169.254.7.7/16 dev eth0 scope link").unwrap();
    a.ip("addr add 10.9.9.9/24 dev eth0 valid_lft 1000 preferred_lft 0").unwrap();
    a.ip("-6 addr add fd00::1/64 dev eth0").unwrap();
    let eth0 = node::index(&a, "eth0");

    let addresses = inside(&a, async |kernel| kernel.addresses().await.unwrap());

    let of =
        |text: &str| addresses.iter().find(|it| it.address == text.parse::<Ipv4Addr>().unwrap()).unwrap();
    let first = of("192.168.77.11");
    assert_eq!((first.ifindex, first.prefix_len, first.scope), (eth0, 24, AddressScope::Universe));
    assert!(first.permanent && !first.secondary && !first.deprecated);
    assert!(of("192.168.77.99").secondary);
    assert_eq!(of("169.254.7.7").scope, AddressScope::Link);
    assert_eq!(of("127.0.0.1").scope, AddressScope::Host);
    let leased = of("10.9.9.9");
    assert!(!leased.permanent && leased.deprecated);
    assert_eq!(addresses.len(), 5);
}

#[test]
fn routes_are_as_ip_shows_them() {
    let (a, _b) = node::pair();
    let eth0 = node::index(&a, "eth0");
    a.ip("route add 10.20.0.0/16 via 192.168.77.12 metric 5 src 192.168.77.11").unwrap();
    a.ip("route add 10.21.0.0/16 via 10.21.0.0 dev eth0 onlink proto 76").unwrap();
    a.ip("route add 10.22.0.0/16 via 192.168.77.12 table 1000").unwrap();
    a.ip("route add blackhole 10.23.0.0/16").unwrap();
    a.ip("route add 10.24.0.0/16 nexthop via 192.168.77.12 nexthop via 192.168.77.13").unwrap();

    let routes = inside(&a, async |kernel| kernel.routes().await.unwrap());

    let to = |dst: &str| routes.iter().find(|it| it.dst == dst.parse().unwrap()).unwrap();
    let route = to("10.20.0.0/16");
    assert_eq!(route.gateway, Some(Ipv4Addr::new(192, 168, 77, 12)));
    assert_eq!((route.ifindex, route.metric, route.protocol, route.table), (Some(eth0), 5, 3, 254));
    assert_eq!(route.source, Some(Ipv4Addr::new(192, 168, 77, 11)));
    assert!(to("10.21.0.0/16").onlink && to("10.21.0.0/16").protocol == 76);
    assert_eq!(to("10.22.0.0/16").table, 1000);
    assert_eq!(to("10.23.0.0/16").kind, RouteKind::Blackhole);
    assert!(to("10.24.0.0/16").multipath && to("10.24.0.0/16").ifindex.is_none());
    assert_eq!(to("192.168.77.0/24").protocol, 2);
    assert_eq!(routes.len(), 6, "{routes:?}");
}

#[test]
fn the_way_to_a_destination_is_told() {
    let (a, _b) = node::pair();
    let eth0 = node::index(&a, "eth0");
    a.ip("route add default via 192.168.77.12 mtu 1300").unwrap();
    a.ip("route add 10.24.0.0/16 nexthop via 192.168.77.12 nexthop via 192.168.77.13").unwrap();
    a.ip("route add unreachable 10.25.0.0/16").unwrap();
    inside(&a, async |kernel| {
        let to = async |text: &str| kernel.route_to::<V4>(text.parse().unwrap()).await;
        let way = to("192.168.77.12").await.unwrap();
        assert_eq!((way.ifindex, way.gateway, way.source), (eth0, None, Ipv4Addr::new(192, 168, 77, 11)));
        assert!(!way.multipath && !way.local);
        let way = to("8.8.8.8").await.unwrap();
        assert_eq!((way.gateway, way.mtu), (Some(Ipv4Addr::new(192, 168, 77, 12)), Some(1300)));
        assert!(to("10.24.1.1").await.unwrap().multipath);
        assert!(to("192.168.77.11").await.unwrap().local);
        let error = to("10.25.1.1").await.unwrap_err();
        assert_eq!(error.to_string(), "looking for the route to 10.25.1.1: No route to host (os error 113)");
    });
}

#[test]
fn neighbours_and_fdb_are_as_the_tools_show_them() {
    let (a, _b) = node::pair();
    let pod = node::pod(&a, "10.5.1.0/24");
    node::ping(&pod, "10.5.1.1").unwrap();
    a.ip("link add flannel.1 type vxlan id 1 dev eth0 local 192.168.77.11 dstport 8472 nolearning").unwrap();
    a.exec("bridge fdb add 02:00:00:00:00:09 dev flannel.1 dst 192.168.77.12 self permanent").unwrap();
    a.ip("neigh add 192.168.77.50 lladdr 02:00:00:00:00:05 dev eth0 nud permanent").unwrap();
    let [bridge, port, eth0, flannel] =
        ["cni0", "vethpod", "eth0", "flannel.1"].map(|name| node::index(&a, name));
    let pod_mac = json(&pod, "ip -j link show dev eth0")[0]["address"].as_str().unwrap().to_owned();

    inside(&a, async |kernel| {
        // Others may be there as well: multicast groups that the kernel has joined.
        let neighbour = async |link, address: [u8; 4]| {
            let neighbours = kernel.neighbours(link).await.unwrap();
            neighbours.into_iter().find(|it| it.address == Ipv4Addr::from(address)).unwrap()
        };
        let found = neighbour(bridge, [10, 5, 1, 2]).await;
        assert_eq!(found.mac.map(mac_text).as_ref(), Some(&pod_mac));
        assert!(found.state.is_valid());
        let found = neighbour(eth0, [192, 168, 77, 50]).await;
        assert_eq!((found.state, found.mac), (NeighbourState::Permanent, Some([2, 0, 0, 0, 0, 5])));

        let ports = kernel.fdb(FdbOf::Bridge(bridge)).await.unwrap();
        let learned: Vec<_> = ports.iter().filter(|it| it.ifindex == port && !it.permanent).collect();
        assert_eq!(learned.len(), 1, "{ports:?}");
        assert_eq!(mac_text(learned[0].mac), pod_mac);
        let vteps = kernel.fdb(FdbOf::Device(flannel)).await.unwrap();
        assert_eq!(vteps.len(), 1, "{vteps:?}");
        assert_eq!(vteps[0].dst, Some(Ipv4Addr::new(192, 168, 77, 12)));
        assert!(vteps[0].own && vteps[0].permanent);
        assert!(kernel.fdb(FdbOf::All).await.unwrap().len() > ports.len());
    });
}

#[test]
fn one_connection_serves_many_at_once_and_those_who_give_up() {
    let (a, _b) = node::pair();
    let batch: String = (0..4000_u32)
        .map(|n| format!("route add 10.{}.{}.0/24 via 192.168.77.12\n", 128 + n / 250, n % 250))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), batch).unwrap();
    a.ip(&format!("-batch {}", file.path().display())).unwrap();
    inside(&a, async |kernel| {
        // Given up in the middle of the answer: the rest must not spoil the next one.
        for _ in 0..20 {
            let _ = tokio::time::timeout(Duration::from_micros(300), kernel.routes()).await;
        }
        let all = futures::future::join_all((0..8).map(|_| async {
            let (routes, links, way) = tokio::join!(
                kernel.routes(),
                kernel.links(),
                kernel.route_to::<V4>(Ipv4Addr::new(192, 168, 77, 12)),
            );
            (routes.unwrap().len(), links.unwrap().len(), way.unwrap().gateway)
        }));
        assert_eq!(all.await, vec![(4001, 2, None); 8]);
    });
}

#[test]
fn a_list_that_changes_while_it_is_read_is_read_again() {
    let (a, _b) = node::pair();
    let busy = "route add 10.99.0.0/24 via 192.168.77.12\nroute del 10.99.0.0/24\n".repeat(20_000);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), busy).unwrap();
    let batch: String = (0..2000_u32)
        .map(|n| format!("route add 10.{}.{}.0/24 via 192.168.77.12\n", 128 + n / 250, n % 250))
        .collect();
    let many = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(many.path(), batch).unwrap();
    a.ip(&format!("-batch {}", many.path().display())).unwrap();
    let mut command = a.command("ip");
    let mut busy = command.arg("-batch").arg(file.path()).spawn().unwrap();
    inside(&a, async |kernel| {
        for _ in 0..20 {
            let routes = kernel.routes().await.unwrap();
            let many = routes.iter().filter(|route| route.dst.network().octets()[1] >= 128);
            // 192.168.77.0/24 counts among them.
            assert_eq!(many.count(), 2001);
        }
    });
    busy.kill().unwrap();
    busy.wait().unwrap();
}
