//! The kernel tells what changes; what it could not tell, it tells that too.

use std::time::Duration;

use loden_agent::kernel::{Change, Events, KernelEvent, LinkKind, NeighbourState};
use loden_tests::netns::Netns;

use crate::{inside, node};

/// Waits for an event that `matches` likes; others before it are passed over.
async fn wait_for(events: &mut Events, what: &str, matches: impl Fn(&KernelEvent) -> bool) -> KernelEvent {
    let seen = async {
        loop {
            let event = events.next().await.unwrap();
            if matches(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), seen).await.unwrap_or_else(|_| panic!("no event: {what}"))
}

#[test]
fn every_sort_of_change_is_told_with_its_details() {
    let (a, _b) = node::pair();
    let eth0 = node::index(&a, "eth0");
    let make = "ip link add flannel.1 type vxlan id 1 dev eth0 local 192.168.77.11 dstport 8472";
    inside(&a, async |kernel| {
        let mut events = kernel.events().unwrap();
        for line in [
            make,
            "ip link set flannel.1 address 02:00:00:00:00:77",
            "ip addr add 10.5.1.0/32 dev flannel.1",
            "ip link set flannel.1 up",
            "ip route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink",
            "ip neigh add 10.5.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud permanent",
            "bridge fdb add 02:00:00:00:00:02 dev flannel.1 dst 192.168.77.12 self permanent",
            "bridge fdb del 02:00:00:00:00:02 dev flannel.1 self",
            "ip neigh del 10.5.2.0 dev flannel.1",
            "ip route del 10.5.2.0/24",
            "ip -4 rule add to 192.168.77.12 lookup 100",
            "ip -6 rule add to fd77::12 lookup 100",
            "ip addr flush dev flannel.1",
            "ip link del flannel.1",
        ] {
            a.exec(line).unwrap();
        }
        let events = &mut events;
        wait_for(events, "the new device", |it| {
            matches!(it, KernelEvent::Link(Change::New, link)
                if matches!(link.kind, LinkKind::Vxlan(vxlan) if vxlan.vni == 1 && vxlan.uplink == Some(eth0)))
        })
        .await;
        wait_for(events, "its new MAC address", |it| {
            matches!(it, KernelEvent::Link(Change::New, link) if link.mac == Some([2, 0, 0, 0, 0, 0x77]))
        })
        .await;
        wait_for(
            events,
            "its address",
            |it| matches!(it, KernelEvent::Address(Change::New, it) if it.address.octets() == [10, 5, 1, 0]),
        )
        .await;
        wait_for(events, "up", |it| matches!(it, KernelEvent::Link(Change::New, link) if link.up)).await;
        let dst = "10.5.2.0/24".parse().unwrap();
        wait_for(
            events,
            "the route",
            |it| matches!(it, KernelEvent::Route(Change::New, it) if it.dst == dst && it.onlink),
        )
        .await;
        let mac = Some([2, 0, 0, 0, 0, 2]);
        wait_for(events, "the neighbour", |it| {
            matches!(it, KernelEvent::Neighbour(Change::New, it)
                if it.mac == mac && it.state == NeighbourState::Permanent)
        })
        .await;
        let vtep = Some([192, 168, 77, 12].into());
        let fdb = |it: &KernelEvent, wanted| matches!(it, KernelEvent::Fdb(change, it) if *change == wanted && it.dst == vtep);
        wait_for(events, "the FDB entry", |it| fdb(it, Change::New)).await;
        wait_for(events, "no FDB entry", |it| fdb(it, Change::Deleted)).await;
        wait_for(events, "no neighbour", |it| matches!(it, KernelEvent::Neighbour(Change::Deleted, _))).await;
        wait_for(
            events,
            "no route",
            |it| matches!(it, KernelEvent::Route(Change::Deleted, it) if it.dst == dst),
        )
        .await;
        for family in ["IPv4", "IPv6"] {
            wait_for(events, &format!("the rule of {family}"), |it| matches!(it, KernelEvent::Rule)).await;
        }
        wait_for(events, "no address", |it| matches!(it, KernelEvent::Address(Change::Deleted, _))).await;
        wait_for(
            events,
            "no device",
            |it| matches!(it, KernelEvent::Link(Change::Deleted, link) if link.name == "flannel.1"),
        )
        .await;
    });
}

#[test]
fn a_port_that_leaves_its_bridge_is_not_a_link_that_is_gone() {
    let (a, _b) = node::pair();
    let _pod = node::pod(&a, "10.5.1.0/24");
    let port = node::index(&a, "vethpod");
    inside(&a, async |kernel| {
        let mut events = kernel.events().unwrap();
        a.ip("link set vethpod nomaster").unwrap();
        a.ip("link set vethpod alias end").unwrap();
        let freed = |it: &KernelEvent| {
            assert!(!matches!(it, KernelEvent::Link(Change::Deleted, _)), "{it:?}");
            matches!(it, KernelEvent::Link(Change::New, link) if link.index == port && link.master.is_none())
        };
        wait_for(&mut events, "the port without a bridge", freed).await;
    });
}

/// The trap that the module's documentation names: nobody may wait for these events.
#[test]
fn routes_that_go_down_with_their_link_are_not_told() {
    let (a, _b) = node::pair();
    a.ip("route add 10.88.0.0/24 via 192.168.77.12").unwrap();
    inside(&a, async |kernel| {
        let mut events = kernel.events().unwrap();
        a.ip("link set eth0 down").unwrap();
        a.ip("link set lo mtu 1500").unwrap();
        let lost = "10.88.0.0/24".parse().unwrap();
        let end = |it: &KernelEvent| {
            assert!(
                !matches!(it, KernelEvent::Route(Change::Deleted, it) if it.dst == lost),
                "it is told after all"
            );
            matches!(it, KernelEvent::Link(_, link) if link.loopback)
        };
        wait_for(&mut events, "the end", end).await;
        assert!(!kernel.routes().await.unwrap().iter().any(|route| route.dst == lost));
    });
}

#[test]
fn events_that_do_not_fit_become_an_overrun_and_listening_goes_on() {
    let netns = Netns::create("flood").unwrap();
    inside(&netns, async |kernel| {
        let mut events = kernel.events().unwrap();
        let mut batch = String::new();
        for n in 0..20_000 {
            batch.push_str(&format!("link set lo alias {n}\n"));
        }
        // This thread runs the runtime too: nothing is read from the socket meanwhile.
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();
        netns.exec(&format!("ip -batch {}", file.path().display())).unwrap();
        wait_for(&mut events, "the overrun", |it| *it == KernelEvent::Overrun).await;
        // Each change after that is told, or else that it was lost as well; and at last changes are told.
        for n in 1..=20 {
            netns.ip(&format!("addr add 127.5.5.{n}/32 dev lo")).unwrap();
            let told = |it: &KernelEvent| matches!(it, KernelEvent::Address(..) | KernelEvent::Overrun);
            if wait_for(&mut events, "what comes after", told).await != KernelEvent::Overrun {
                return;
            }
        }
        panic!("nothing but overruns");
    });
}

#[test]
fn a_changed_ruleset_is_told_once_for_many_changes_and_nothing_else_is() {
    let netns = Netns::create("rules").unwrap();
    inside(&netns, async |kernel| {
        let mut events = kernel.ruleset_events().unwrap();
        let wait = Duration::from_millis(200);
        for change in [
            "nft add table ip somebody",
            "iptables -A FORWARD -s 10.0.0.0/8 -j DROP",
            "iptables -P FORWARD DROP",
            "nft flush ruleset",
        ] {
            netns.exec(change).unwrap();
            netns.exec("iptables -A INPUT -j ACCEPT").unwrap();
            tokio::time::timeout(wait, events.changed()).await.expect(change).unwrap();
            tokio::time::timeout(wait, events.changed()).await.expect_err("it is told once");
        }
        for reading in ["nft list ruleset", "iptables -S", "ip link set lo mtu 1500"] {
            netns.exec(reading).unwrap();
            tokio::time::timeout(wait, events.changed()).await.expect_err(reading);
        }
    });
}
