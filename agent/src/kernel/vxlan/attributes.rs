//! What a VXLAN device is made of, and whether one that is there may stay. Pure.

use std::net::IpAddr;

use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};

use super::{DEFAULT_PORT, VxlanSpec};
use crate::kernel::{Link, LinkKind, VxlanAttrs};

/// What makes a device unfit to be adopted, in words; `None` where it is fit.
pub(super) fn difference(spec: &VxlanSpec, link: &Link) -> Option<String> {
    let LinkKind::Vxlan(found) = &link.kind else {
        return Some(format!("it is a {:?} link, not a VXLAN device", link.kind));
    };
    let address = |address: Option<IpAddr>| address.map_or_else(|| "none".to_owned(), |it| it.to_string());
    let port = wanted_port(spec);
    if found.collect_metadata {
        Some("it is an external (collect metadata) device".to_owned())
    } else if found.vni != spec.vni {
        Some(format!("VNI is {}, not {}", found.vni, spec.vni))
    } else if found.uplink != Some(spec.uplink) {
        Some(format!("uplink is link {}, not link {}", found.uplink.unwrap_or(0), spec.uplink))
    } else if found.local != Some(spec.local) {
        Some(format!("local address is {}, not {}", address(found.local), spec.local))
    } else if found.port != port {
        Some(format!("port is {}, not {port}", found.port))
    } else if found.gbp != spec.gbp {
        Some(format!("GBP is {}, not {}", found.gbp, spec.gbp))
    } else if found.l2miss {
        Some("L2 miss notifications are on".to_owned())
    } else {
        None
    }
}

/// What `ip link add NAME address MAC mtu MTU type vxlan id VNI dev UPLINK local LOCAL dstport PORT
/// nolearning` sends. TTL (auto), ageing (300 s) and UDP checksum (on) are the kernel's defaults.
pub(super) fn creation(spec: &VxlanSpec, mac: [u8; 6]) -> LinkMessage {
    let mut data = vec![
        InfoVxlan::Id(spec.vni),
        InfoVxlan::Link(spec.uplink),
        match spec.local {
            IpAddr::V4(local) => InfoVxlan::Local(local),
            IpAddr::V6(local) => InfoVxlan::Local6(local),
        },
        InfoVxlan::Learning(spec.learning),
        InfoVxlan::Port(wanted_port(spec)),
    ];
    if spec.gbp {
        data.push(InfoVxlan::Gbp);
    }
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.clone()),
        // At creation, not after: an address that was set (NET_ADDR_SET) is left alone by systemd's
        // MACAddressPolicy=persistent, a random one is not (flannel #1155).
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        vxlan_info(data),
    ];
    message
}

pub(in crate::kernel) fn vxlan_info(data: Vec<InfoVxlan>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))])
}

pub(super) fn wanted_port(spec: &VxlanSpec) -> u16 {
    if spec.port == 0 { DEFAULT_PORT } else { spec.port }
}

pub(super) fn learning(link: &Link) -> bool {
    matches!(link.kind, LinkKind::Vxlan(VxlanAttrs { learning: true, .. }))
}

/// A random unicast address with the locally administered bit (IEEE 802).
pub(crate) fn random_mac() -> [u8; 6] {
    let mut mac: [u8; 6] = rand::random();
    mac[0] = mac[0] & 0xfe | 0x02;
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VxlanSpec {
        VxlanSpec {
            name: "flannel.1".to_owned(),
            vni: 1,
            port: 0,
            local: [192, 168, 77, 11].into(),
            uplink: 2,
            mtu: 1450,
            gbp: false,
            learning: false,
            mac: None,
            noted: None,
        }
    }

    fn link(change: impl FnOnce(&mut VxlanAttrs)) -> Link {
        let mut attrs = VxlanAttrs {
            vni: 1,
            port: 8472,
            local: Some([192, 168, 77, 11].into()),
            uplink: Some(2),
            ..VxlanAttrs::default()
        };
        change(&mut attrs);
        Link {
            index: 7,
            name: "flannel.1".to_owned(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            up: true,
            carrier: true,
            running: true,
            master: None,
            peer: None,
            peer_in_other_netns: None,
            kind: LinkKind::Vxlan(attrs),
            loopback: false,
            point_to_point: false,
            no_arp: false,
            alias: None,
        }
    }

    #[test]
    fn the_attributes_that_flannel_compares_decide() {
        assert_eq!(difference(&spec(), &link(|_| {})), None);
        let why = |change: fn(&mut VxlanAttrs)| difference(&spec(), &link(change)).unwrap();
        assert_eq!(why(|it| it.vni = 2), "VNI is 2, not 1");
        assert_eq!(why(|it| it.uplink = None), "uplink is link 0, not link 2");
        assert_eq!(why(|it| it.local = None), "local address is none, not 192.168.77.11");
        assert_eq!(why(|it| it.port = 4789), "port is 4789, not 8472");
        assert_eq!(why(|it| it.gbp = true), "GBP is true, not false");
        assert_eq!(why(|it| it.l2miss = true), "L2 miss notifications are on");
        assert_eq!(why(|it| it.collect_metadata = true), "it is an external (collect metadata) device");
        assert_eq!(difference(&spec(), &link(|it| it.learning = true)), None);
        let bridge = Link { kind: LinkKind::Bridge, ..link(|_| {}) };
        assert_eq!(difference(&spec(), &bridge).unwrap(), "it is a Bridge link, not a VXLAN device");
    }

    #[test]
    fn a_random_mac_is_unicast_and_locally_administered() {
        for _ in 0..1000 {
            assert_eq!(random_mac()[0] & 3, 2);
        }
    }
}
