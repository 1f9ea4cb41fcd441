//! The packet: every unsafe access to it, behind a type whose borrows end where the kernel's pointers do.
//!
//! Helpers that may move the packet take `&mut self`, so no reference into the packet survives them: what the
//! verifier checks at load, the borrow checker says at compile time.

use core::mem::{self, MaybeUninit};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_DEC, BPF_CSUM_LEVEL_QUERY, BPF_F_ADJ_ROOM_ENCAP_L2_ETH,
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
        BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_fib_lookup as FibLookup,
        bpf_hdr_start_off::BPF_HDR_START_NET, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
    },
    helpers::{
        bpf_csum_level, bpf_get_hash_recalc, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_adjust_room,
        bpf_skb_change_type, bpf_skb_pull_data,
        generated::{bpf_fib_lookup, bpf_skb_load_bytes_relative},
    },
    programs::TcContext,
};
use loden_ebpf::{ethernet, vxlan};

/// `BPF_F_ADJ_ROOM_ENCAP_L2(len)`: the length of the inner Ethernet header, in the flags' top byte.
const ENCAP_L2_ETHERNET: u64 = (ethernet::LEN as u64) << 56;
/// Grow for VXLAN. FIXED_GSO: segments keep their size (the MTU check has counted the headers). ENCAP_*: the
/// kernel learns where the inner headers are, so that NICs and GSO can segment and checksum.
const GROW: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
    | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
    | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64
    | ENCAP_L2_ETHERNET;
/// And that they start with Ethernet, without which no NIC segments them but the kernel does. (Linux 5.13)
const GROW_ETHERNET: u64 = GROW | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64;
/// Shrink. Without FIXED_GSO the segments of an aggregate would grow by what is taken off; without
/// NO_CSUM_RESET a checksum that the NIC has verified would be computed again. (Linux 5.8)
const SHRINK: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64 | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64;
/// `EINVAL` of asm-generic/errno-base.h.
const EINVAL: i32 = 22;
/// Addressed to this host: `PACKET_HOST` of linux/if_packet.h.
const PACKET_HOST: u32 = 0;
/// Addressed to another host: `PACKET_OTHERHOST`, ibid.
const PACKET_OTHERHOST: u32 = 3;
/// TC index of packets that skipped the host stack on their way to a direct peer.
const FAST: u32 = 0x10de;
/// AF_INET.
const AF_INET: u32 = 2;

/// A packet at a TC hook.
pub(super) struct Skb {
    raw: *mut __sk_buff,
}

/// Reads a field of the context. A macro, because each field must be one load at a constant offset.
macro_rules! field {
    ($self:ident.$name:ident) => {
        // SAFETY: the kernel passes a valid context for as long as the program runs.
        unsafe { (*$self.raw).$name }
    };
}

impl Skb {
    #[inline(always)]
    pub(super) fn new(ctx: TcContext) -> Self {
        Self { raw: ctx.as_ptr().cast() }
    }

    /// The context, for the log's macros.
    #[inline(always)]
    pub(super) fn context(&self) -> TcContext {
        TcContext::new(self.raw)
    }

    /// The context, for helpers that take nothing else.
    #[inline(always)]
    pub(super) fn raw(&self) -> *mut __sk_buff {
        self.raw
    }

    /// Length of the frame, Ethernet header included; of a GSO packet, the whole.
    #[inline(always)]
    pub(super) fn len(&self) -> u32 {
        field!(self.len)
    }

    /// EtherType behind VLAN tags, as the kernel parsed it; host order.
    #[inline(always)]
    pub(super) fn ether_type(&self) -> u16 {
        u16::from_be(field!(self.protocol) as u16)
    }

    /// Whether a VLAN tag stands beside the packet.
    #[inline(always)]
    pub(super) fn has_vlan(&self) -> bool {
        field!(self.vlan_present) != 0
    }

    /// The VLAN of the tag beside the packet; 0 without a tag, and for one that has only a priority.
    #[inline(always)]
    pub(super) fn vlan_id(&self) -> u32 {
        field!(self.vlan_tci) & 0xfff
    }

    /// Payload of each segment of a GSO packet, 0 for others.
    #[inline(always)]
    pub(super) fn gso_size(&self) -> u32 {
        field!(self.gso_size)
    }

    /// Segments of a GSO packet where the kernel knows them, 0 for others. (Linux 5.1)
    #[inline(always)]
    pub(super) fn gso_segs(&self) -> u32 {
        field!(self.gso_segs)
    }

    /// The interface at which the program runs.
    #[inline(always)]
    pub(super) fn ifindex(&self) -> u32 {
        field!(self.ifindex)
    }

    /// Whether the frame's destination is this host, and it alone.
    #[inline(always)]
    pub(super) fn is_for_host(&self) -> bool {
        field!(self.pkt_type) == PACKET_HOST
    }

    /// Whether the frame is for another host: the IP stack will not have it.
    #[inline(always)]
    pub(super) fn is_for_another_host(&self) -> bool {
        field!(self.pkt_type) == PACKET_OTHERHOST
    }

    /// A copy of `N` bytes from `offset` on, counted from the network header, wherever in the packet they are. Dearer
    /// than [`Self::bytes`], and right for interfaces without Ethernet as well. (Linux 4.18)
    #[inline(always)]
    pub(super) fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the context is valid, and the helper writes `N` bytes or says that it could not.
        unsafe {
            let to = bytes.as_mut_ptr().cast();
            let failed =
                bpf_skb_load_bytes_relative(self.raw.cast(), offset as u32, to, N as u32, BPF_HDR_START_NET);
            if failed == 0 { Some(bytes.assume_init()) } else { None }
        }
    }

    /// Whether the host would take a packet of these addresses that came by this interface for its own, or for
    /// everybody: the routing table is asked. (Linux 4.18)
    #[inline(always)]
    pub(super) fn is_for_this_host(&self, source: [u8; 4], destination: [u8; 4]) -> bool {
        // SAFETY: all zeroes are valid fields; the parameters are on the stack for the length of the call; the context
        // is valid.
        let answer = unsafe {
            let mut asked: FibLookup = mem::zeroed();
            asked.family = AF_INET as u8;
            asked.ifindex = self.ifindex();
            asked.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(source);
            asked.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(destination);
            bpf_fib_lookup(self.raw.cast(), &raw mut asked, size_of::<FibLookup>() as i32, 0)
        };
        // Not to be forwarded: it ends here. Where the host does not forward, nothing else is let in.
        answer == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) || answer == i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED)
    }

    /// `N` bytes of the packet from `offset`, where they are in its linear part.
    #[inline(always)]
    pub(super) fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        let start = field!(self.data) as usize + offset;
        if start + N > field!(self.data_end) as usize {
            return None;
        }
        // SAFETY: the comparison above keeps the range inside the packet (the verifier insists on it), and
        // the bytes stay there until a helper moves them, which needs `&mut self`.
        Some(unsafe { &*(start as *const [u8; N]) })
    }

    /// As [`Self::bytes`], to write.
    #[inline(always)]
    pub(super) fn bytes_mut<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        let start = field!(self.data) as usize + offset;
        if start + N > field!(self.data_end) as usize {
            return None;
        }
        // SAFETY: as in `bytes`; `&mut self` makes the reference the only one.
        Some(unsafe { &mut *(start as *mut [u8; N]) })
    }

    /// Brings the first `len` bytes into the linear part. Some drivers leave only the Ethernet header there.
    ///
    /// GSO packets are left alone: pulling into one that was built as a fragment list crashed kernels before
    /// 6.16, and where it matters their headers are linear anyway.
    #[inline(always)]
    pub(super) fn make_linear(&mut self, len: u32) {
        if self.gso_size() == 0 && self.len() >= len {
            // SAFETY: the context is valid; no reference into the packet is alive (`&mut self`). A failure
            // leaves the packet as it is, and the next look at its bytes says so.
            unsafe { bpf_skb_pull_data(self.raw, len) };
        }
    }

    /// The flow hash of the packet, from its socket where it has one; computed where it is missing.
    #[inline(always)]
    pub(super) fn hash(&mut self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { bpf_get_hash_recalc(self.raw) as u32 }
    }

    /// Makes room for the outer headers in front of the inner packet. Failing, it has changed nothing.
    #[inline(always)]
    pub(super) fn grow(&mut self) -> bool {
        // SAFETY: the context is valid; no reference into the packet is alive.
        let grow = |flags| unsafe {
            bpf_skb_adjust_room(self.raw, vxlan::ENCAP_LEN as i32, BPF_ADJ_ROOM_MAC, flags)
        };
        match grow(GROW_ETHERNET) {
            0 => true,
            // A flag that the kernel does not know is refused before anything else is looked at.
            error if error as i32 == -EINVAL => grow(GROW) == 0,
            _ => false,
        }
    }

    /// Whether the kernel would take the checksum of the outermost UDP or TCP header for right without a look: NIC or
    /// GRO have verified it (`CHECKSUM_UNNECESSARY`). GRO has that of every segment of an aggregate, too, and what a
    /// sender on this machine hands over in one piece has no checksum yet (`CHECKSUM_PARTIAL`).
    #[inline(always)]
    pub(super) fn is_checksum_verified(&self) -> bool {
        // SAFETY: the context is valid; the query changes nothing. (Linux 5.8)
        self.gso_size() != 0 || unsafe { bpf_csum_level(self.raw, BPF_CSUM_LEVEL_QUERY as u64) >= 0 }
    }

    /// Takes the outer headers off. Failing, it has changed nothing.
    #[inline(always)]
    pub(super) fn shrink(&mut self) -> bool {
        // SAFETY: as in `grow`. The UDP header that the NIC may have verified is gone with it: one level less.
        unsafe {
            let done =
                bpf_skb_adjust_room(self.raw, -(vxlan::ENCAP_LEN as i32), BPF_ADJ_ROOM_MAC, SHRINK) == 0;
            if done {
                bpf_csum_level(self.raw, BPF_CSUM_LEVEL_DEC as u64);
            }
            done
        }
    }

    /// Sends the packet to a neighbour on the underlay; the kernel resolves it and writes the outer MACs.
    #[inline(always)]
    pub(super) fn redirect_neighbour(&mut self, ifindex: u32, next_hop: [u8; 4]) -> i32 {
        // The union is written whole: the verifier wants every byte of the parameters to have a value.
        let next_hop = bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [u32::from_ne_bytes(next_hop), 0, 0, 0] };
        let mut params = bpf_redir_neigh { nh_family: AF_INET, __bindgen_anon_1: next_hop };
        // SAFETY: the parameters are on the stack for the length of the call, which copies them.
        unsafe { bpf_redirect_neigh(ifindex, &raw mut params, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
    }

    /// Leaves a note on the packet for our program at the uplink's egress: it skipped the host stack. The note is the
    /// TC index, which lives as long as the packet is on this host and which only TC programs and qdiscs read.
    #[inline(always)]
    pub(super) fn note_fast(&mut self) {
        // SAFETY: the context is valid.
        unsafe { (*self.raw).tc_index = FAST }
    }

    /// Whether the packet has the note of [`Self::note_fast`]; takes it off.
    #[inline(always)]
    pub(super) fn take_fast(&mut self) -> bool {
        let fast = field!(self.tc_index) == FAST;
        if fast {
            // SAFETY: the context is valid.
            unsafe { (*self.raw).tc_index = 0 }
        }
        fast
    }

    /// Delivers the packet into the namespace of the veth's other end, as if that had received it.
    #[inline(always)]
    pub(super) fn redirect_peer(&mut self, ifindex: u32) -> i32 {
        // SAFETY: the context is valid. The mark is this host's business, not the pod's.
        unsafe {
            (*self.raw).mark = 0;
            bpf_redirect_peer(ifindex, 0) as i32
        }
    }

    /// Tells the stack that the frame is for the host that will get it.
    #[inline(always)]
    pub(super) fn set_for_host(&mut self) {
        // SAFETY: the context is valid.
        unsafe { bpf_skb_change_type(self.raw, PACKET_HOST) };
    }
}
