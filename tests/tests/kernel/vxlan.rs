//! The VXLAN device: flannel's attributes, adopted or made anew, and put right again.

use loden_agent::{
    family::V4,
    kernel::{VxlanSpec, mac_text, sysctl},
};
use serde_json::json as object;

use crate::{inside, json, node};

const BY_HAND: &str = "link add flannel.1 address 02:11:22:33:44:55 mtu 1450 type vxlan id 1 dev eth0 \
                       local 192.168.77.11 dstport 8472 nolearning";

#[test]
fn a_new_device_has_every_attribute_of_one_that_flannel_makes() {
    let (a, b) = node::pair();
    b.ip(&BY_HAND.replace("77.11", "77.12")).unwrap();
    let spec = node::spec(&a, "192.168.77.11");

    let device = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap());

    let shown = json(&a, "ip -j -d link show dev flannel.1")[0].clone();
    let mut by_hand = json(&b, "ip -j -d link show dev flannel.1")[0].clone();
    assert_eq!(shown["address"], object!(mac_text(device.mac)));
    by_hand["address"] = shown["address"].clone();
    by_hand["ifindex"] = shown["ifindex"].clone();
    by_hand["linkinfo"]["info_data"]["local"] = object!("192.168.77.11");
    assert_eq!(shown, by_hand);
    assert_eq!((device.adopted, device.mtu, device.mac[0] & 3), (false, 1450, 2));
    assert_eq!(a.exec("sysctl -n net.ipv6.conf.flannel/1.accept_ra").unwrap().trim(), "0");
}

#[test]
fn group_policy_and_learning_are_set_where_they_are_asked_for() {
    let (a, _b) = node::pair();
    let spec = VxlanSpec { gbp: true, learning: true, port: 4789, ..node::spec(&a, "192.168.77.11") };
    inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap());
    let data = json(&a, "ip -j -d link show dev flannel.1")[0]["linkinfo"]["info_data"].clone();
    assert_eq!(
        (&data["gbp"], &data["learning"], &data["port"]),
        (&object!(true), &object!(true), &object!(4789))
    );
}

#[test]
fn a_device_that_flannel_made_is_adopted_with_its_mac_and_entries() {
    let (a, _b) = node::pair();
    a.ip(BY_HAND).unwrap();
    a.ip("addr add 10.5.1.0/32 dev flannel.1").unwrap();
    a.ip("link set flannel.1 up").unwrap();
    a.ip("route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink").unwrap();
    let (spec, before) = (node::spec(&a, "192.168.77.11"), json(&a, "ip -j -d link show dev flannel.1"));

    let device = inside(&a, async |kernel| node::set_up(&kernel, &spec, "10.5.1.0/24").await);

    assert!(device.adopted && device.corrected.is_empty() && device.replaced.is_none(), "{device:?}");
    assert_eq!(device.mac, [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
    assert_eq!(json(&a, "ip -j -d link show dev flannel.1"), before);
    assert_eq!(json(&a, "ip -j route show 10.5.2.0/24")[0]["dev"], "flannel.1");
}

#[test]
fn what_can_be_changed_in_place_is_corrected_and_the_mac_stays() {
    let (a, _b) = node::pair();
    a.ip(&BY_HAND.replace("mtu 1450", "mtu 1300").replace("nolearning", "learning")).unwrap();
    let (spec, index) = (node::spec(&a, "192.168.77.11"), node::index(&a, "flannel.1"));

    let device = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap());

    assert_eq!((device.index, device.adopted, device.mtu), (index, true, 1450));
    assert_eq!(device.mac, [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
    assert_eq!(device.corrected, ["MTU 1300 to 1450", "learning to false"]);
    let data = json(&a, "ip -j -d link show dev flannel.1")[0]["linkinfo"]["info_data"].clone();
    assert_eq!(
        (&data["learning"], &data["id"], &data["port"]),
        (&object!(false), &object!(1), &object!(8472))
    );
    assert_eq!(data["local"], "192.168.77.11");
}

#[test]
fn the_mtu_follows_what_the_uplink_carries_and_never_exceeds_the_config() {
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    inside(&a, async |kernel| {
        for (uplink, device) in [(1400, 1350), (1400, 1350), (1500, 1450), (1300, 1250), (9000, 1450)] {
            a.ip(&format!("link set eth0 mtu {uplink}")).unwrap();
            assert_eq!(kernel.ensure_vxlan(&spec).await.unwrap().mtu, device, "over {uplink}");
            let again = kernel.ensure_vxlan(&spec).await.unwrap();
            assert!(again.adopted && again.corrected.is_empty(), "{again:?}");
        }
    });
}

#[test]
fn without_its_uplink_the_device_is_not_made() {
    let (a, _b) = node::pair();
    let spec = VxlanSpec { uplink: 4711, ..node::spec(&a, "192.168.77.11") };
    let error = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap_err());
    assert_eq!(error.to_string(), "there is no link with index 4711 (the uplink)");
}

/// Makes a device that differs, and returns why it was made anew.
fn replaced(by_hand: &str) -> String {
    let (a, _b) = node::pair();
    a.ip("addr add 192.168.77.99/24 dev eth0").unwrap();
    a.ip(by_hand).unwrap();
    let (spec, index) = (node::spec(&a, "192.168.77.11"), node::index(&a, "flannel.1"));
    let device = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap());
    assert!(!device.adopted);
    assert_ne!(device.index, index);
    if by_hand.contains("type vxlan") {
        assert_eq!(device.mac, [2, 0x11, 0x22, 0x33, 0x44, 0x55], "peers know it by that");
    }
    let again = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap());
    assert!(again.adopted && again.mac == device.mac && again.index == device.index);
    device.replaced.unwrap()
}

#[test]
fn a_device_that_differs_is_made_anew_and_the_attribute_named() {
    assert_eq!(replaced(&BY_HAND.replace("id 1", "id 2")), "VNI is 2, not 1");
    assert_eq!(
        replaced(&BY_HAND.replace("77.11", "77.99")),
        "local address is 192.168.77.99, not 192.168.77.11"
    );
    assert_eq!(replaced(&BY_HAND.replace("8472", "4789")), "port is 4789, not 8472");
    assert_eq!(replaced(&BY_HAND.replace("nolearning", "nolearning gbp")), "GBP is true, not false");
    assert_eq!(replaced(&BY_HAND.replace("nolearning", "nolearning l2miss")), "L2 miss notifications are on");
    assert!(replaced(&BY_HAND.replace("dev eth0 ", "")).starts_with("uplink is link 0, not link "));
    assert_eq!(replaced("link add flannel.1 type bridge"), "it is a Bridge link, not a VXLAN device");
}

#[test]
fn a_device_that_was_deleted_comes_back_with_the_mac_that_peers_know() {
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    inside(&a, async |kernel| {
        let first = kernel.ensure_vxlan(&spec).await.unwrap();
        let spec = VxlanSpec { mac: Some(first.mac), ..spec.clone() };
        let noted = VxlanSpec { mac: None, noted: Some(first.mac), ..spec.clone() };
        a.ip("link del flannel.1").unwrap();
        assert_eq!(kernel.ensure_vxlan(&noted).await.unwrap().mac, first.mac, "an earlier agent's");
        a.ip("link del flannel.1").unwrap();
        a.ip(&BY_HAND.replace("id 1", "id 2")).unwrap();
        assert_eq!(
            kernel.ensure_vxlan(&noted).await.unwrap().mac,
            first.mac,
            "not that of one that is no good"
        );
        a.ip("link del flannel.1").unwrap();
        a.ip(BY_HAND).unwrap();
        assert_ne!(
            kernel.ensure_vxlan(&noted).await.unwrap().mac,
            first.mac,
            "whoever made it has told of it"
        );
        a.ip("link del flannel.1").unwrap();
        let second = kernel.ensure_vxlan(&spec).await.unwrap();
        assert_eq!((second.mac, second.adopted), (first.mac, false));

        a.ip("link set flannel.1 address 02:de:ad:be:ef:00").unwrap();
        let third = kernel.ensure_vxlan(&spec).await.unwrap();
        assert_eq!((third.mac, third.index), (first.mac, second.index));
        assert_eq!(third.corrected, [format!("MAC 02:de:ad:be:ef:00 to {}", mac_text(first.mac))]);
    });
    assert_eq!(json(&a, "ip -j link show dev flannel.1")[0]["address"].as_str().map(str::len), Some(17));
}

#[test]
fn a_vni_that_another_device_has_is_an_error_that_names_the_device() {
    let (a, _b) = node::pair();
    a.ip(&BY_HAND.replace("flannel.1", "overlay9")).unwrap();
    let spec = node::spec(&a, "192.168.77.11");
    let error = inside(&a, async |kernel| kernel.ensure_vxlan(&spec).await.unwrap_err());
    assert_eq!(
        error.to_string(),
        "flannel.1 cannot be created: overlay9 has VNI 1 on UDP port 8472 already; remove it, or choose another \
         VNI or Port in the network config"
    );
}

#[test]
fn the_overlay_address_is_the_only_one_of_the_network_and_foreign_ones_stay() {
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    a.ip(BY_HAND).unwrap();
    // 10.4.0.0/16 is what the network was before.
    for address in ["10.4.3.0/32", "10.5.9.0/32", "10.5.1.0/24", "172.31.0.1/32"] {
        a.ip(&format!("addr add {address} dev flannel.1")).unwrap();
    }
    a.ip("link set flannel.1 up").unwrap();
    a.ip("route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink").unwrap();
    let own = "10.5.1.0/24".parse().unwrap();
    let networks = [node::NETWORK, "10.4.0.0/16"].map(|network| network.parse().unwrap()).into();

    inside(&a, async |kernel| {
        let device = kernel.ensure_vxlan(&spec).await.unwrap().index;
        assert!(!kernel.has_overlay_address::<V4>(device, own, &networks).await.unwrap());
        kernel.set_overlay_address::<V4>(device, own, &networks).await.unwrap();
        assert!(kernel.has_overlay_address::<V4>(device, own, &networks).await.unwrap());
    });

    let shown = json(&a, "ip -j -4 addr show dev flannel.1");
    let addresses: Vec<_> = shown[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| format!("{}/{}", it["local"].as_str().unwrap(), it["prefixlen"]))
        .collect();
    assert_eq!(addresses, ["172.31.0.1/32", "10.5.1.0/32"]);
    assert_eq!(json(&a, "ip -j route show 10.5.2.0/24")[0]["dev"], "flannel.1", "routes outlive the change");
}

#[test]
fn a_flushed_address_and_a_link_that_is_down_are_put_right() {
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    let (own, networks) = ("10.5.1.0/24".parse().unwrap(), [node::NETWORK.parse().unwrap()].into());
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        for damage in ["addr flush dev flannel.1", "link set flannel.1 down"] {
            a.ip(damage).unwrap();
            assert!(!kernel.has_overlay_address::<V4>(device, own, &networks).await.unwrap(), "{damage}");
            kernel.set_overlay_address::<V4>(device, own, &networks).await.unwrap();
            assert!(kernel.has_overlay_address::<V4>(device, own, &networks).await.unwrap(), "{damage}");
        }
    });
}

#[test]
fn deleting_takes_a_vxlan_device_only() {
    let (a, _b) = node::pair();
    a.ip("link add flannel.1 type bridge").unwrap();
    inside(&a, async |kernel| {
        assert!(!kernel.delete_overlay_device("flannel.1").await.unwrap());
        assert!(!kernel.delete_overlay_device("flannel.2").await.unwrap());
        a.ip("link del flannel.1").unwrap();
        a.ip(BY_HAND).unwrap();
        assert!(kernel.delete_overlay_device("flannel.1").await.unwrap());
        assert_eq!(kernel.link_by_name("flannel.1").await.unwrap(), None);
    });
}

#[test]
fn sysctls_belong_to_the_namespace() {
    let (a, b) = node::pair();
    a.run(|| sysctl::set("net.ipv4.ip_forward", "0").unwrap());
    assert_eq!(a.exec("sysctl -n net.ipv4.ip_forward").unwrap().trim(), "0");
    assert_eq!(b.run(|| sysctl::get("net.ipv4.ip_forward").unwrap()), "1");
}
