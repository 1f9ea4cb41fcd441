//! Entry points, and what they have in common.

mod encap;
mod from_other;
mod from_overlay;
mod from_pod;
mod from_wire;
mod gate;
mod globals;
mod guard;
mod half;
mod log;
mod maps;
mod observe;
mod outer;
mod skb;
mod trace;
mod traffic;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use loden_ebpf::{
    ethernet,
    family::{V4, V6},
    reason::Reason,
    trace::Program,
};

use self::skb::Skb;

/// What a program decided.
enum Verdict {
    /// The packet skipped the host stack: what the redirect helper returned.
    Redirect(Reason, i32),
    /// The packet goes on into the kernel as it came.
    Pass(Reason),
    /// The packet ends here.
    Drop(Reason),
    /// None of our business, and not counted.
    Ignore,
}

impl From<Reason> for Verdict {
    fn from(reason: Reason) -> Self {
        Self::Pass(reason)
    }
}

/// A verdict as one number, which a function that is not inlined can return: the reason's number plus one in the upper
/// half, 0 for what is ignored, and what the kernel wants in the lower one. `TC_ACT_UNSPEC` lets other programs at the hook
/// run; on TCX it means "next".
impl From<Verdict> for u64 {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        let (reason, action) = match verdict {
            Verdict::Redirect(_, TC_ACT_SHOT) => (Reason::DropRedirect, TC_ACT_SHOT),
            Verdict::Redirect(reason, action) => (reason, action),
            Verdict::Pass(reason) => (reason, TC_ACT_UNSPEC),
            Verdict::Drop(reason) => (reason, TC_ACT_SHOT),
            Verdict::Ignore => return 0,
        };
        Self::from(reason as u32 + 1) << 32 | Self::from(action as u32)
    }
}

/// Lets a family's body judge the packet, and concludes. The bodies are functions
/// of their own: together they would need more than the 512 bytes of stack that a program has, and neither costs the other
/// registers.
#[inline(always)]
fn run(
    program: Program,
    ctx: TcContext,
    v4: fn(*mut __sk_buff) -> u64,
    v6: fn(*mut __sk_buff) -> u64,
    neither: Verdict,
    then: fn(&Skb, u64) -> u64,
) -> i32 {
    let skb = Skb::new(ctx);
    let len = skb.len();
    let verdict = match skb.ether_type() {
        ethernet::IPV4 => v4(skb.raw()),
        ethernet::IPV6 if globals::HAS_V6.load() == 1 => v6(skb.raw()),
        _ => neither.into(),
    };
    conclude(program, &skb, then(&skb, verdict), len)
}

/// Counts a verdict on a packet of this length, tells of it, and answers the kernel.
#[inline(always)]
fn conclude(program: Program, skb: &Skb, verdict: u64, len: u32) -> i32 {
    if verdict == 0 {
        return TC_ACT_UNSPEC;
    }
    let reason = (verdict >> 32) as u32 - 1;
    maps::count(reason, len);
    log::tell(skb, program, reason, len);
    trace::tell(skb, program, reason, len);
    verdict as i32
}

#[xdp]
pub(crate) fn guard(ctx: XdpContext) -> u32 {
    guard::run(&ctx)
}

/// A program: its bodies, what it makes of a packet of neither family, and what looks at the packet after that.
macro_rules! programs {
    ($($name:ident as $program:ident: $module:ident::$body:ident, else $neither:expr, then $then:path;)+) => {
        $(
            #[classifier]
            pub(crate) fn $name(ctx: TcContext) -> i32 {
                #[inline(never)]
                fn v4(raw: *mut __sk_buff) -> u64 {
                    $module::$body::<V4>(&mut Skb::of(raw)).into()
                }

                #[inline(never)]
                fn v6(raw: *mut __sk_buff) -> u64 {
                    $module::$body::<V6>(&mut Skb::of(raw)).into()
                }

                run(Program::$program, ctx, v4, v6, $neither, $then)
            }
        )+
    };
}

programs! {
    from_pod as FromPod: from_pod::run, else Reason::PassPodNotIp.into(), then from_other::of_pod;
    from_wire as FromWire: from_wire::run, else Verdict::Ignore, then from_other::of_wire;
    from_overlay as FromOverlay: from_overlay::run, else Reason::PassOverlay.into(), then judged;
    to_overlay as ToOverlay: observe::leaves_overlay, else Verdict::Ignore, then judged;
    to_wire as ToWire: observe::leaves_wire, else Verdict::Ignore, then judged;
    to_pod as ToPod: observe::inbound, else Verdict::Ignore, then judged;
}

#[classifier]
pub(crate) fn from_other(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let len = skb.len();
    conclude(Program::FromOther, &skb, from_other::of_wire(&skb, Verdict::Ignore.into()), len)
}

/// Nothing looks at the packet any more.
#[inline(always)]
fn judged(_: &Skb, verdict: u64) -> u64 {
    verdict
}
