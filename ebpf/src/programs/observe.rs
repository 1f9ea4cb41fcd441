//! The flow gate's two points: what goes into the host stack is noted, what comes out is compared. Only looks, but for one
//! case: a translated flow may begin with the tuple of a connection that the pod has past the host. Its packet ends here, and
//! the agent tells the host of that connection, so that the next one gets another tuple.

use loden_ebpf::{
    abi::{Endpoint, FlowKey, UNPROVEN},
    ethernet,
    family::Family,
    flow::{Direction, Left},
    reason::Reason,
    transport,
};

use super::{Verdict, gate, globals, half::Half, maps, skb::Skb, traffic};

/// Where the IP header of a frame stands. Of a device whose packets have no Ethernet header it stands at 0, so what looks
/// at either takes the place as `AT`.
const IP: usize = ethernet::LEN;

/// Egress of the overlay's device.
#[inline(always)]
pub(super) fn leaves_overlay<F: Half>(skb: &mut Skb) -> Verdict {
    if globals::BARE_DEVICE.load() == 1 { leaves_host::<F, 0>(skb) } else { leaves_host::<F, IP>(skb) }
}

/// Egress of an uplink with direct peers.
#[inline(always)]
pub(super) fn leaves_wire<F: Half>(skb: &mut Skb) -> Verdict {
    leaves_host::<F, IP>(skb)
}

/// What skipped the host stack was concluded already.
#[inline(always)]
fn leaves_host<F: Half, const AT: usize>(skb: &mut Skb) -> Verdict {
    if skb.take_fast() {
        return Verdict::Ignore;
    }
    traffic::leaves_host::<F>(skb, AT);
    outbound::<F, AT>(skb)
}

/// From a local pod towards a peer.
#[inline(always)]
fn outbound<F: Half, const AT: usize>(skb: &mut Skb) -> Verdict {
    reach::<F>(skb, AT);
    let Some((ip, key, tcp_flags)) = read::<F>(skb, AT, Direction::Outbound) else { return Verdict::Ignore };
    let Some(endpoint) = F::endpoint(F::source(ip)) else { return Verdict::Ignore };
    if F::peer(F::destination(ip)).is_none() {
        return Verdict::Ignore;
    }
    conclude::<F>(skb, AT, &key, tcp_flags, Direction::Outbound, endpoint)
}

/// Egress of the host side of a pod's veth: from a peer's pod towards the local one.
#[inline(always)]
pub(super) fn inbound<F: Half>(skb: &mut Skb) -> Verdict {
    reach::<F>(skb, IP);
    let Some((ip, key, tcp_flags)) = read::<F>(skb, IP, Direction::Inbound) else { return Verdict::Ignore };
    let (source, destination) = (F::source(ip), F::destination(ip));
    // A bridge floods what it has not learned: only the destination's own port counts.
    let Some(endpoint) = F::endpoint(destination).filter(|endpoint| endpoint.ifindex == skb.ifindex()) else {
        return Verdict::Ignore;
    };
    if F::peer(source).is_some() {
        return conclude::<F>(skb, IP, &key, tcp_flags, Direction::Inbound, endpoint);
    }
    if let Some(sender) = F::endpoint(source) {
        // From another local pod: the flow is that one's, and its reverse is this one's.
        return conclude_local::<F>(skb, &key.reversed(), tcp_flags, sender, destination);
    }
    Verdict::Ignore
}

/// Point 2 of a flow between two local pods: what was translated gates both.
#[inline(always)]
fn conclude_local<F: Half>(
    skb: &Skb,
    key: &FlowKey<F::Octets>,
    tcp_flags: u8,
    sender: &Endpoint<F::Octets>,
    destination: F::Addr,
) -> Verdict {
    let verdict = conclude::<F>(skb, IP, key, tcp_flags, Direction::Outbound, sender);
    if let Verdict::Pass(_) = verdict {
        F::gate_endpoint(destination);
    }
    verdict
}

/// An IP packet for a pod, not encapsulated, on its way into the host stack: may it skip that? If not, it is noted
/// as point 1 of its flow. One that may, and has no Ethernet header, has room for one then.
#[inline(always)]
pub(super) fn forward<F: Half, const AT: usize>(
    skb: &mut Skb,
    endpoint: &'static Endpoint<F::Octets>,
) -> Result<&'static Endpoint<F::Octets>, ()> {
    reach::<F>(skb, AT);
    let (ip, key, tcp_flags) = read::<F>(skb, AT, Direction::Inbound).ok_or(())?;
    let plain = F::is_plain(ip)
        && F::is_undamaged(ip)
        && !skb.has_vlan()
        && !F::is_fragment(ip)
        && F::hops(ip) > 1
        && F::packet_len(ip) + AT as u32 == skb.len()
        && !skb.is_cut(F::protocol(ip), AT + F::LEN);
    let is_fast = plain
        && skb.is_for_host()
        && (!gate::is_gated(endpoint)
            || matches!(gate::ask::<F>(&key, Direction::Inbound, tcp_flags), gate::Answer::Fast));
    // Only making room can fail without harm, so it comes before everything else that is done to the packet.
    if is_fast && (AT != 0 || skb.grow_ethernet()) {
        return Ok(endpoint);
    }
    gate::enter::<F>(skb, AT, &key, Direction::Inbound, tcp_flags);
    Err(())
}

#[inline(always)]
fn conclude<F: Half>(
    skb: &Skb,
    at: usize,
    key: &FlowKey<F::Octets>,
    tcp_flags: u8,
    direction: Direction,
    local: &Endpoint<F::Octets>,
) -> Verdict {
    // A new endpoint may have come between both points; the agent looks up whether it is that or a translation.
    let left = gate::leave::<F>(skb, at, key, direction, tcp_flags);
    if left != Left::Translated || local.gated == UNPROVEN {
        return Verdict::Ignore;
    }
    if begins::<F>(key, tcp_flags) && skb.has_connection::<F>(local.netns, key) {
        gate::hold::<F>(key);
        match direction {
            Direction::Outbound => maps::tell_taken(key),
            Direction::Inbound => maps::tell_taken(&key.reversed()),
        }
        return Verdict::Drop(Reason::DropTupleTaken);
    }
    gate::translated::<F>(key);
    F::gate_endpoint(F::addr(&key.local));
    Verdict::Pass(Reason::NoteTranslated)
}

/// Whether this translated packet may be the first of its flow, so that its tuple may be that of a connection which the
/// pod had before: through the open gate the host knows none of those. Later ones were let through. Through the strict
/// gate it knows them all, and keeps tuples apart by itself.
#[inline(always)]
fn begins<F: Half>(key: &FlowKey<F::Octets>, tcp_flags: u8) -> bool {
    globals::STRICT.load() == 0
        && if key.protocol == u32::from(transport::TCP) {
            transport::opens_tcp(tcp_flags)
        } else {
            key.protocol == u32::from(transport::UDP) && !gate::is_translated::<F>(key)
        }
}

/// Brings what [`read`] looks at into the linear part.
#[inline(always)]
fn reach<F: Half>(skb: &mut Skb, at: usize) {
    skb.reach(at + F::LEN + 8, (at + F::LEN + 20) as u32);
}

/// An IP header, its flow, and TCP's flags.
type Read<'a, F> = (&'a <F as Family>::Header, FlowKey<<F as Family>::Octets>, u8);

/// Reads the IP header at `at` and the flow; `None` where the gate has nothing to go by.
#[inline(always)]
fn read<F: Half>(skb: &Skb, at: usize, direction: Direction) -> Option<Read<'_, F>> {
    let ip = skb.read::<F::Header>(at)?;
    if F::is_later_fragment(ip) {
        return None;
    }
    let next = at + F::header_len(ip);
    let protocol = F::protocol(ip);
    let (source_port, destination_port) = F::ports(ip, skb.bytes(next)?)?;
    let tcp_flags = if protocol == transport::TCP { skb.bytes::<1>(next + 13)?[0] } else { 0 };
    let source = (F::source(ip), source_port);
    let destination = (F::destination(ip), destination_port);
    let (local, remote) = match direction {
        Direction::Outbound => (source, destination),
        Direction::Inbound => (destination, source),
    };
    Some((ip, F::flow_key(protocol, local, remote), tcp_flags))
}
