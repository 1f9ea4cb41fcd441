//! The packet: every unsafe access to it, behind a type whose borrows end where the kernel's pointers do.
//!
//! Helpers that may move the packet take `&mut self`, so no reference into the packet survives them: what the
//! verifier checks at load, the borrow checker says at compile time.

use core::{
    arch::asm,
    mem::{self, MaybeUninit},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_DEC, BPF_CSUM_LEVEL_QUERY, BPF_F_ADJ_ROOM_ENCAP_L2_ETH,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET,
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
        bpf_fib_lookup as FibLookup, bpf_hdr_start_off::BPF_HDR_START_NET, bpf_redir_neigh,
    },
    helpers::{
        bpf_csum_level, bpf_csum_update, bpf_get_hash_recalc, bpf_redirect, bpf_redirect_neigh,
        bpf_redirect_peer, bpf_skb_adjust_room, bpf_skb_change_type, bpf_skb_load_bytes, bpf_skb_pull_data,
        generated::{
            bpf_fib_lookup, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_change_head,
            bpf_skb_load_bytes_relative,
        },
    },
    programs::TcContext,
};
use loden_ebpf::{abi::FlowKey, ethernet, family::Bytes, ipv6, transport, vxlan};

use super::half::Half;

/// `BPF_F_ADJ_ROOM_ENCAP_L2(len)`: the length of the inner Ethernet header, in the flags' top byte.
const ENCAP_L2_ETHERNET: u64 = (ethernet::LEN as u64) << 56;
/// Grow for VXLAN. FIXED_GSO: segments keep their size (the MTU check has counted the headers). ENCAP_*: the
/// kernel learns where the inner headers are, so that NICs and GSO can segment and checksum.
const GROW: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
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
/// TC index of packets that skipped the host stack on their way to an egress that has a program.
const FAST: u32 = 0x10de;

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

    /// The packet of a context that [`Self::raw`] gave.
    #[inline(always)]
    pub(super) fn of(raw: *mut __sk_buff) -> Self {
        Self { raw }
    }

    /// The context, to pass it on to a function that is not inlined.
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

    /// A copy of bytes from `offset` on, counted from the network header, wherever in the packet they are. Dearer
    /// than [`Self::read`], and right for interfaces without Ethernet as well. (Linux 4.18)
    #[inline(always)]
    pub(super) fn load<T: Bytes>(&self, offset: usize) -> Option<T> {
        let mut bytes = MaybeUninit::<T>::uninit();
        let (to, len) = (bytes.as_mut_ptr().cast(), size_of::<T>() as u32);
        // SAFETY: the context is valid; a helper writes all bytes of `T`, which may be any, or says that it could not.
        // The first looks into the linear part alone; a sender can choose to have no more than headers there.
        unsafe {
            let raw = self.raw.cast();
            let failed = bpf_skb_load_bytes_relative(raw, offset as u32, to, len, BPF_HDR_START_NET) != 0
                && bpf_skb_load_bytes(raw, self.network_header() + offset as u32, to, len) != 0;
            if failed { None } else { Some(bytes.assume_init()) }
        }
    }

    /// Where the network header stands, counted from where the kernel starts to count: behind an Ethernet header, or at
    /// once where the interface has none.
    #[inline(always)]
    pub(super) fn network_header(&self) -> u32 {
        let mut byte = 0u8;
        // The linear part's last byte is within it, counted from the network header, only where nothing stands before that.
        let last = self.linear_len().wrapping_sub(1);
        let to = (&raw mut byte).cast();
        // SAFETY: the context is valid; the helper writes one byte or says that it could not.
        let failed =
            unsafe { bpf_skb_load_bytes_relative(self.raw.cast(), last as u32, to, 1, BPF_HDR_START_NET) };
        if failed == 0 { 0 } else { ethernet::LEN as u32 }
    }

    /// Length of the linear part, in bytes.
    #[inline(always)]
    fn linear_len(&self) -> usize {
        let mut len = field!(self.data_end) as usize;
        let start = field!(self.data) as usize;
        // SAFETY: two registers are subtracted. By hand, since the compiler would also make it an addition of the
        // complement, and the verifier knows no complement of an address.
        unsafe {
            asm!("{0} -= {1}", inout(reg) len, in(reg) start, options(pure, nomem, nostack, preserves_flags))
        };
        len
    }

    /// Whether the host would take a packet of these addresses that came by this interface for its own, or for
    /// everybody: the routing table is asked. (Linux 4.18)
    #[inline(always)]
    pub(super) fn is_for_this_host<F: Half>(&self, source: F::Addr, destination: F::Addr) -> bool {
        // SAFETY: all zeroes are valid fields; the parameters are on the stack for the length of the call; the context
        // is valid.
        let answer = unsafe {
            let mut asked: FibLookup = mem::zeroed();
            asked.ifindex = self.ifindex();
            F::set_addresses(&mut asked, source, destination);
            bpf_fib_lookup(self.raw.cast(), &raw mut asked, size_of::<FibLookup>() as i32, 0)
        };
        // Not to be forwarded: it ends here. Where the host does not forward, nothing else is let in.
        answer == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) || answer == i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED)
    }

    /// Whether a network namespace, by the number that it has here, has a socket that is connected from the flow's local end
    /// to its remote one, of TCP or UDP; one that listens to everybody does not count. (Linux 4.20)
    #[inline(always)]
    pub(super) fn has_connection<F: Half>(&self, netns: i32, flow: &FlowKey<F::Octets>) -> bool {
        // As the kernel has it: who sends to the socket comes first. What stands behind the ports is not looked at.
        let mut tuple = flow.reversed();
        let len = (2 * size_of::<F::Octets>() + 4) as u32;
        let (skb, netns) = (self.raw.cast(), i64::from(netns) as u64);
        // SAFETY: the context is valid, the tuple on the stack for the length of the call; the socket is not used after it has
        // been given back, and the words that are read are in every socket.
        unsafe {
            let tuple = (&raw mut tuple).cast();
            let socket = if flow.protocol == u32::from(transport::TCP) {
                bpf_sk_lookup_tcp(skb, tuple, len, netns, 0)
            } else {
                bpf_sk_lookup_udp(skb, tuple, len, netns, 0)
            };
            if socket.is_null() {
                return false;
            }
            let is_connected = F::is_connected(socket);
            bpf_sk_release(socket.cast());
            is_connected
        }
    }

    /// Bytes of the packet from `offset`, where they are in its linear part.
    #[inline(always)]
    pub(super) fn read<T: Bytes>(&self, offset: usize) -> Option<&T> {
        let start = field!(self.data) as usize + offset;
        if start + size_of::<T>() > field!(self.data_end) as usize {
            return None;
        }
        // SAFETY: the comparison above keeps the range inside the packet (the verifier insists on it), `T` may be
        // any bytes, and they stay there until a helper moves them, which needs `&mut self`.
        Some(unsafe { &*(start as *const T) })
    }

    /// As [`Self::read`], to write.
    #[inline(always)]
    pub(super) fn write<T: Bytes>(&mut self, offset: usize) -> Option<&mut T> {
        let start = field!(self.data) as usize + offset;
        if start + size_of::<T>() > field!(self.data_end) as usize {
            return None;
        }
        // SAFETY: as in `read`; `&mut self` makes the reference the only one.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// [`Self::read`] of `N` bytes.
    #[inline(always)]
    pub(super) fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.read(offset)
    }

    /// Whether the header at `next` is TCP's and not whole: the gate reads its flags, and nobody can follow a part of it.
    #[inline(always)]
    pub(super) fn is_cut(&self, protocol: u8, next: usize) -> bool {
        protocol == transport::TCP && self.bytes::<20>(next).is_none()
    }

    /// [`Self::write`] of `N` bytes.
    #[inline(always)]
    pub(super) fn bytes_mut<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        self.write(offset)
    }

    /// Outer headers of VXLAN over IPv6, to write, and the inner IP header behind them.
    #[inline(always)]
    pub(super) fn split(&mut self, offset: usize) -> Option<(&mut [u8; vxlan::ENCAP_LEN_V6], &ipv6::Header)> {
        let both = self.write::<[u8; vxlan::ENCAP_LEN_V6 + ipv6::LEN]>(offset)?;
        let (headers, inner) = both.split_first_chunk_mut()?;
        Some((headers, inner.first_chunk()?))
    }

    /// Sees to it that the first `least` bytes are in the linear part, and brings `len` bytes there where they are not.
    #[inline(always)]
    pub(super) fn reach(&mut self, least: usize, len: u32) {
        self.forget_addresses();
        if field!(self.data) as usize + least > field!(self.data_end) as usize {
            self.make_linear(len);
        }
        self.forget_addresses();
    }

    /// Keeps the compiler from computing the address of one of the context's fields here for an access there: the verifier
    /// wants each access at an offset from the context itself. A move, since without an instruction of its own it would share a
    /// place in the line information with the next one, which the kernel refuses.
    #[inline(always)]
    #[expect(
        clippy::pointers_in_nomem_asm_block,
        reason = "the pointer is moved, and nothing read through it"
    )]
    fn forget_addresses(&mut self) {
        // SAFETY: a register is moved into itself.
        unsafe { asm!("{0} = {0}", inout(reg) self.raw, options(pure, nomem, nostack, preserves_flags)) };
    }

    /// Brings the first `len` bytes into the linear part. Some drivers leave only the Ethernet header there.
    ///
    /// GSO packets are left alone: pulling into one that was built as a fragment list crashed kernels before
    /// 6.16, and where it matters their headers are linear anyway.
    #[inline(always)]
    fn make_linear(&mut self, len: u32) {
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
    pub(super) fn grow<F: Half>(&mut self) -> bool {
        // SAFETY: the context is valid; no reference into the packet is alive.
        let grow = |flags| unsafe {
            bpf_skb_adjust_room(self.raw, F::ENCAP_LEN as i32, BPF_ADJ_ROOM_MAC, flags | F::ENCAP_L3)
        };
        match grow(GROW_ETHERNET) {
            0 => true,
            // A flag that the kernel does not know is refused before anything else is looked at.
            error if error as i32 == -EINVAL => grow(GROW) == 0,
            _ => false,
        }
    }

    /// Makes room for an Ethernet header, all zeroes, in front of a packet that has none. Failing, it has changed nothing.
    /// Aggregates stay aggregates, and checksums what they were: those of the stack begin behind it.
    #[inline(always)]
    pub(super) fn grow_ethernet(&mut self) -> bool {
        // SAFETY: as in `grow`. (Linux 4.10)
        unsafe { bpf_skb_change_head(self.raw, ethernet::LEN as u32, 0) == 0 }
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
    pub(super) fn shrink<F: Half>(&mut self) -> bool {
        // SAFETY: as in `grow`. The UDP header that the NIC may have verified is gone with it: one level less.
        unsafe {
            let done = bpf_skb_adjust_room(self.raw, -(F::ENCAP_LEN as i32), BPF_ADJ_ROOM_MAC, SHRINK) == 0;
            if done {
                bpf_csum_level(self.raw, BPF_CSUM_LEVEL_DEC as u64);
            }
            done
        }
    }

    /// Sends the packet to a neighbour on the underlay; the kernel resolves it and writes the outer MACs.
    #[inline(always)]
    pub(super) fn redirect_neighbour<F: Half>(&mut self, ifindex: u32, next_hop: &F::Octets) -> i32 {
        let mut params = MaybeUninit::uninit();
        F::set_neighbour(&mut params, next_hop);
        // SAFETY: the parameters have been written, and are on the stack for the length of the call, which copies them.
        unsafe {
            bpf_redirect_neigh(ifindex, params.as_mut_ptr(), size_of::<bpf_redir_neigh>() as i32, 0) as i32
        }
    }

    /// Sends the packet out of an interface as it is; one without Ethernet gets it without the Ethernet header.
    #[inline(always)]
    pub(super) fn redirect(&mut self, ifindex: u32) -> i32 {
        // SAFETY: the helper takes two numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// Says that words behind the Ethernet header which summed to `before` now sum to `after` (in memory order), where the
    /// kernel has a sum of all of them from the NIC (`CHECKSUM_COMPLETE`) and no checksum in the packet makes up for it.
    #[inline(always)]
    pub(super) fn resummed(&mut self, before: u32, after: u32) {
        let difference = u64::from(after) + u64::from(!before);
        let difference = (difference >> 32) as u32 + difference as u32;
        // SAFETY: the context is valid. Without such a sum the helper does nothing.
        unsafe { bpf_csum_update(self.raw, difference) };
    }

    /// Leaves a note on the packet for our program at an egress: it skipped the host stack. The note is the
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
