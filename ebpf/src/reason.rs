//! Why a packet went where it went: one enum for every verdict of every program.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// The reason of a verdict, and its index in the map `COUNTERS`. `Fast…` skipped the host stack, `Pass…`
        /// went on into it unchanged, `Drop…` ended.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name in metrics, logs and `loden status`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc,)+),)+
                }
            }
        }
    };
}

reasons! {
    /// encapsulated at the pod's veth and sent to the uplink
    FastEncap => "fast_encap",
    /// put straight into the overlay's device: what WireGuard encrypts; of VXLAN an IPv6 aggregate, whose segments get their
    /// outer checksums there
    FastOverlayOut => "fast_overlay_out",
    /// decapsulated at the uplink and delivered into the pod
    FastDecap => "fast_decap",
    /// routed from the pod's veth to a direct peer, without encapsulation
    FastDirectOut => "fast_direct_out",
    /// from a direct peer at the uplink, delivered into the pod
    FastDirectIn => "fast_direct_in",
    /// from one local pod straight to another
    FastLocal => "fast_local",
    /// decapsulated or decrypted by the kernel, then delivered into the pod past the host stack
    FastOverlay => "fast_overlay",

    /// from a pod: of no family that the network has (ARP, say), or with a VLAN tag
    PassPodNotIp => "pass_pod_not_ip",
    /// from a pod: the destination is in no peer's subnet (local, external, a service address)
    PassPodNoPeer => "pass_pod_no_peer",
    /// from a pod to another local one: the bridge's, since the gate or the frame does not allow the shortcut
    PassPodLocal => "pass_pod_local",
    /// from a pod: the source is not this pod's own address
    PassPodForeignSource => "pass_pod_foreign_source",
    /// from a pod: the frame is not for the pod's gateway
    PassPodNotForGateway => "pass_pod_not_for_gateway",
    /// from a pod: too short, its lengths disagree, or its header checksum is wrong
    PassPodMalformed => "pass_pod_malformed",
    /// from a pod: IP options or extension headers
    PassPodOptions => "pass_pod_options",
    /// from a pod: a fragment
    PassPodFragment => "pass_pod_fragment",
    /// from a pod: the TTL or hop limit ends here
    PassPodTtl => "pass_pod_ttl",
    /// from a pod: a protocol that the flow gate cannot follow (neither TCP, UDP nor an echo)
    PassPodProtocol => "pass_pod_protocol",
    /// from a pod: UDP over IPv6 without a checksum, from which the outer one would follow
    PassPodChecksum => "pass_pod_checksum",
    /// from a pod: the flow gate has not qualified the flow
    PassPodGate => "pass_pod_gate",
    /// from a pod: SYN, FIN or RST of a flow that is gated
    PassPodTcpControl => "pass_pod_tcp_control",
    /// from a pod: does not fit the underlay's MTU after encapsulation, or the device that encrypts
    PassPodTooBig => "pass_pod_too_big",
    /// from a pod: the kernel could not make room for the headers
    PassPodNoRoom => "pass_pod_no_room",
    /// from a pod: the fast path has no way to the peer now, or leaves what goes there to IPsec
    PassPodNoUplink => "pass_pod_no_uplink",

    /// from the underlay: outer fragment, IP options, extension headers, a cut header, or lengths or a checksum that are
    /// wrong
    PassWireOuter => "pass_wire_outer",
    /// from the underlay: VXLAN flags other than a VNI
    PassWireFlags => "pass_wire_flags",
    /// from the underlay: another overlay's VNI
    PassWireVni => "pass_wire_vni",
    /// from the underlay: the inner frame is not for our VXLAN device, or not of the outer family
    PassWireInnerFrame => "pass_wire_inner_frame",
    /// from the underlay: inner IP options, extension headers, fragment, or lengths or a checksum that are wrong
    PassWireInnerPacket => "pass_wire_inner_packet",
    /// from the underlay: the inner source belongs to no subnet of the sending peer
    PassWireForeignSource => "pass_wire_foreign_source",
    /// from the underlay: the inner destination is no known local pod
    PassWireNoEndpoint => "pass_wire_no_endpoint",
    /// from the underlay: the inner TTL or hop limit ends here
    PassWireTtl => "pass_wire_ttl",
    /// from the underlay: a protocol that the flow gate cannot follow
    PassWireProtocol => "pass_wire_protocol",
    /// from the underlay: the flow gate has not qualified the flow
    PassWireGate => "pass_wire_gate",
    /// from the underlay: SYN, FIN or RST of a flow that is gated
    PassWireTcpControl => "pass_wire_tcp_control",
    /// from the underlay: congestion met by a packet that does not know ECN; the kernel drops it
    PassWireEcn => "pass_wire_ecn",
    /// from the underlay: an outer checksum that neither NIC nor GRO has verified nor the headers explain; the kernel does
    PassWireChecksum => "pass_wire_checksum",
    /// from the underlay: an aggregate of datagrams, which the kernel may have to take apart for its socket: it decapsulates
    /// that itself
    PassWireAggregate => "pass_wire_aggregate",
    /// from the underlay: the kernel could not take the headers off
    PassWireNoRoom => "pass_wire_no_room",

    /// from a direct peer at the uplink: handed on to the host stack
    PassDirect => "pass_direct",
    /// from the VXLAN or WireGuard device: handed on to the host stack
    PassOverlay => "pass_overlay",

    /// at an uplink or any other interface: VXLAN from an address that is no peer's
    DropUnknownVtep => "drop_unknown_vtep",
    /// the same, dropped by the guard before the packet became an skb
    DropGuard => "drop_guard",
    /// from a pod: VXLAN of this overlay to a node, which only nodes send
    DropPodVxlan => "drop_pod_vxlan",
    /// from the underlay: a peer sent from a pod address that is not its own, or hid the address
    DropForgedPeerSource => "drop_forged_peer_source",
    /// from a pod: sent from the address of another local pod
    DropForgedPodSource => "drop_forged_pod_source",
    /// first packet of a flow that the host translates, with the tuple of a connection that the pod has itself and the host
    /// does not know: it is told, so that the next one gets another tuple
    DropTupleTaken => "drop_tuple_taken",
    /// the packet was changed already when the kernel refused to redirect it
    DropRedirect => "drop_redirect",

    /// seen at the overlay's device or a pod's veth with another tuple than before the host stack: translated
    NoteTranslated => "note_translated",
}

/// Number of reasons: the size of the map `COUNTERS`.
pub const COUNT: usize = Reason::ALL.len();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_indices_and_names_are_unique_and_classed() {
        let mut names = std::collections::BTreeSet::new();
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(names.insert(reason.name()));
            let class = reason.name().split('_').next().unwrap();
            assert!(["fast", "pass", "drop", "note"].contains(&class), "{class}");
            assert!(!reason.description().is_empty());
        }
    }
}
