//! Programs that the bench compares with, and nothing else uses.
//!
//! | program | hook | does |
//! | --- | --- | --- |
//! | `tunnel_out` | ingress of the host side of a pod's veth | sets the tunnel key, redirects to the VXLAN device |
//! | `tunnel_in` | ingress of the VXLAN device | redirects into the pod |
//! | `redirect_out` | ingress of the host side of a pod's veth | redirects to the other node |
//! | `redirect_in` | ingress of the uplink | redirects into the pod |
//!
//! The first two are pod to pod as Cilium's tunnel mode does it with eBPF host routing. The kernel's VXLAN device
//! (`external`) encapsulates and decapsulates, the programs tell it to whom and skip the rest of the host. Without Cilium's
//! own connection tracking and policy, so faster than Cilium itself.
//!
//! The other two are the least that gets a packet from a pod to a pod of another node: where to, and the MACs. They check,
//! count and encapsulate nothing and leave the TTL alone: what they cost, every program at these hooks costs at least.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        Global,
        bindings::{
            BPF_F_ZERO_CSUM_TX, TC_ACT_UNSPEC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
            bpf_tunnel_key, bpf_tunnel_key__bindgen_ty_1, bpf_tunnel_key__bindgen_ty_2,
            bpf_tunnel_key__bindgen_ty_3,
        },
        helpers::{
            bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_set_tunnel_key,
        },
        macros::{classifier, map},
        maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
        programs::TcContext,
    };
    use loden_ebpf::{ethernet, ipv4};

    /// Interface index of the VXLAN device.
    #[unsafe(no_mangle)]
    static DEVICE: Global<u32> = Global::new(0);
    #[unsafe(no_mangle)]
    static VNI: Global<u32> = Global::new(0);

    /// The VTEP of each subnet, host order.
    #[map]
    static NODES: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(1024, 1);

    /// Of each local pod: interface index, then the first twelve bytes of its frames as they stand in memory.
    #[map]
    static PODS: HashMap<[u8; 4], [u32; 4]> = HashMap::with_max_entries(1024, 0);

    /// Interface index of the link to the other node.
    #[unsafe(no_mangle)]
    static UPLINK: Global<u32> = Global::new(0);
    /// The other node's address there, the network of its subnet, and that subnet's mask, as they stand in memory.
    #[unsafe(no_mangle)]
    static OTHER_NODE: Global<[u32; 3]> = Global::new([0; 3]);
    /// The network of the own subnet, as it stands in memory; its mask is the same.
    #[unsafe(no_mangle)]
    static OWN_SUBNET: Global<u32> = Global::new(0);

    /// What [`PODS`] has of each pod, by the last byte of its address.
    #[map]
    static PODS_BY_BYTE: Array<[u32; 4]> = Array::with_max_entries(256, 0);

    #[classifier]
    pub(crate) fn redirect_out(mut ctx: TcContext) -> i32 {
        away(&mut ctx).unwrap_or(TC_ACT_UNSPEC)
    }

    #[classifier]
    pub(crate) fn redirect_in(mut ctx: TcContext) -> i32 {
        home(&mut ctx).unwrap_or(TC_ACT_UNSPEC)
    }

    #[classifier]
    pub(crate) fn tunnel_out(ctx: TcContext) -> i32 {
        out(&ctx).unwrap_or(TC_ACT_UNSPEC)
    }

    #[classifier]
    pub(crate) fn tunnel_in(ctx: TcContext) -> i32 {
        inward(&ctx).unwrap_or(TC_ACT_UNSPEC)
    }

    fn destination(ctx: &TcContext) -> Option<[u8; 4]> {
        let ether_type: [u8; 2] = ctx.load(12).ok()?;
        if u16::from_be_bytes(ether_type) != ethernet::IPV4 {
            return None;
        }
        ctx.load(ethernet::LEN + 16).ok()
    }

    /// `AF_INET` of linux/socket.h.
    const AF_INET: u32 = 2;

    /// The headers of an IPv4 packet whose destination is in this network.
    #[inline(always)]
    fn headers_into(ctx: &mut TcContext, network: u32, mask: u32) -> Option<&mut Headers> {
        let start = ctx.data();
        if start + size_of::<Headers>() > ctx.data_end() {
            return None;
        }
        // SAFETY: the comparison keeps the range inside the packet, the fields may be any bytes, and nothing moves them while
        // the context is borrowed.
        let headers = unsafe { &mut *(start as *mut Headers) };
        let is_into = headers.ether_type == ethernet::IPV4.to_be_bytes()
            && u32::from_ne_bytes(headers.destination) & mask == network;
        if is_into { Some(headers) } else { None }
    }

    #[repr(C)]
    struct Headers {
        macs: [[u8; 4]; 3],
        ether_type: [u8; 2],
        others: [u8; 16],
        destination: [u8; 4],
    }

    /// So aligned, the verifier takes the stores that the compiler makes of it.
    #[repr(C, align(8))]
    struct Params(bpf_redir_neigh);

    fn away(ctx: &mut TcContext) -> Option<i32> {
        let [address, network, mask] = OTHER_NODE.load();
        headers_into(ctx, network, mask)?;
        let next_hop = bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [address, 0, 0, 0] };
        let mut params = Params(bpf_redir_neigh { nh_family: AF_INET, __bindgen_anon_1: next_hop });
        let len = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the parameters are on the stack for the length of the call, which copies them.
        Some(unsafe { bpf_redirect_neigh(UPLINK.load(), &raw mut params.0, len, 0) } as i32)
    }

    fn home(ctx: &mut TcContext) -> Option<i32> {
        let [_, _, mask] = OTHER_NODE.load();
        let headers = headers_into(ctx, OWN_SUBNET.load(), mask)?;
        let [ifindex, a, b, c] = *PODS_BY_BYTE.get(u32::from(headers.destination[3]))?;
        headers.macs = [a, b, c].map(u32::to_ne_bytes);
        // SAFETY: calls a helper that takes two numbers.
        Some(unsafe { bpf_redirect_peer(ifindex, 0) } as i32)
    }

    fn out(ctx: &TcContext) -> Option<i32> {
        let vtep = *NODES.get(Key::new(32, destination(ctx)?))?;
        let mut key = bpf_tunnel_key {
            tunnel_id: VNI.load(),
            __bindgen_anon_1: bpf_tunnel_key__bindgen_ty_1 { remote_ipv6: [vtep, 0, 0, 0] },
            tunnel_tos: 0,
            tunnel_ttl: 64,
            __bindgen_anon_2: bpf_tunnel_key__bindgen_ty_2 { tunnel_ext: 0 },
            tunnel_label: 0,
            __bindgen_anon_3: bpf_tunnel_key__bindgen_ty_3 { local_ipv6: [0; 4] },
        };
        // SAFETY: the context is valid, and the key is on the stack for the length of the call, which copies it. Its
        // size without the local address is one that every kernel knows.
        let set =
            unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, 28, u64::from(BPF_F_ZERO_CSUM_TX)) };
        if set != 0 {
            return None;
        }
        // SAFETY: calls a helper that takes two numbers.
        Some(unsafe { bpf_redirect(DEVICE.load(), 0) } as i32)
    }

    fn inward(ctx: &TcContext) -> Option<i32> {
        let address = destination(ctx)?;
        // SAFETY: nobody writes the map while packets pass.
        let [ifindex, macs @ ..] = *unsafe { PODS.get(address) }?;
        ctx.store(0, &macs, 0).ok()?;
        let ttl: u8 = ctx.load(ethernet::LEN + 8).ok()?;
        let protocol: u8 = ctx.load(ethernet::LEN + 9).ok()?;
        let old = u64::from(u16::from_ne_bytes([ttl, protocol]));
        let new = u64::from(u16::from_ne_bytes([ttl.wrapping_sub(1), protocol]));
        ctx.l3_csum_replace(ethernet::LEN + ipv4::LEN / 2, old, new, 2).ok()?;
        ctx.store(ethernet::LEN + 8, &ttl.wrapping_sub(1), 0).ok()?;
        // SAFETY: the context is valid; 0 is PACKET_HOST. The redirect takes two numbers.
        Some(unsafe {
            bpf_skb_change_type(ctx.skb.skb, 0);
            bpf_redirect_peer(ifindex, 0) as i32
        })
    }
}

/// The host has no use for the programs.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that this is never reached: it rejects a program with an endless loop.
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
