//! What does not fit the overlay: the kernel's to answer, with the MTU of the family's encapsulation.

use loden_tests::{
    counters::Share,
    each_family,
    family::Family,
    packet::{ETHERNET_LEN, Ipv4, Ipv6},
    traffic::stream::{self, Until},
};

use crate::stage::{PATIENCE, Stage};

each_family!(a_pod_with_a_larger_mtu_hears_of_the_overlays_and_transfers_by_the_fast_path);

/// How a family says that a packet is too big.
trait TooBig: Family {
    /// A packet that nobody on the way may cut.
    fn whole(packet: Self) -> Self;
    /// The MTU in an error (an ICMP message) that says so.
    fn told_mtu(icmp: &[u8]) -> Option<usize>;
}

impl TooBig for Ipv4 {
    fn whole(packet: Self) -> Self {
        Self { fragment: loden_tests::packet::DONT_FRAGMENT, ..packet }
    }

    /// Destination unreachable, fragmentation needed (RFC 1191).
    fn told_mtu(icmp: &[u8]) -> Option<usize> {
        icmp.starts_with(&[3, 4]).then(|| usize::from(u16::from_be_bytes([icmp[6], icmp[7]])))
    }
}

impl TooBig for Ipv6 {
    fn whole(packet: Self) -> Self {
        packet
    }

    /// Packet too big (RFC 4443, section 3.2).
    fn told_mtu(icmp: &[u8]) -> Option<usize> {
        let mtu = icmp.get(4..8)?.try_into().ok()?;
        icmp.starts_with(&[2, 0]).then(|| u32::from_be_bytes(mtu) as usize)
    }
}

fn a_pod_with_a_larger_mtu_hears_of_the_overlays_and_transfers_by_the_fast_path<F: TooBig>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let mtu = 1500 - F::ENCAP_LEN;
    let of_size = |size: usize| F::whole(stage.datagram(&vec![b'b'; size - F::HEADER_LEN - 8])).bytes();
    stage.at_sender.drain().unwrap();
    stage.at_sender.send(&stage.sent_by_sender(&of_size(mtu + 1))).unwrap();
    let told = |frame: &[u8]| {
        let is_icmp = frame[12..14] == F::ETHER_TYPE.to_be_bytes();
        frame.get(ETHERNET_LEN + F::HEADER_LEN..).filter(|_| is_icmp).and_then(F::told_mtu)
    };
    let frames = stage.at_sender.until("the error", PATIENCE, |frame| told(frame).is_some()).unwrap();
    assert_eq!(told(frames.last().unwrap()), Some(mtu));

    // The sender's own stack hears of it by its first segments, sends smaller ones, and these are fast.
    let before = stage.counters()[0].clone();
    let [from, to] = stage.hosts();
    stream::run(from, to, None, Until::Bytes(5_000_000)).unwrap();
    let counted = stage.counters()[0].since(&before);
    assert!(counted.get("pass_pod_too_big") > 0, "{counted:?}");
    let route = stage.sender.netns().ip(&format!("route get {}", to.address)).unwrap();
    assert!(route.contains(&format!("mtu {mtu}")), "{route}");
    let before = stage.counters()[0].clone();
    let pods = [&stage.sender, &stage.destination];
    let work = || stream::run(from, to, None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&stage.cluster.nodes, &pods, work).unwrap();
    assert!(share.smaller() >= 0.98, "{share:?}");
    let counted = stage.counters()[0].since(&before);
    assert_eq!(counted.get("pass_pod_too_big"), 0, "{counted:?}");
}
