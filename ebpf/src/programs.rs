//! Entry points, and what they have in common.

mod from_other;
mod from_overlay;
mod from_pod;
mod from_wire;
mod gate;
mod globals;
mod guard;
mod log;
mod lookup;
mod maps;
mod observe;
mod skb;
mod trace;
mod traffic;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use loden_ebpf::{reason::Reason, trace::Program};

use self::{log::Seen, skb::Skb};

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

/// Counts the verdict and turns it into what the kernel wants. `TC_ACT_UNSPEC` lets other programs at the hook
/// run; on TCX it means "next".
#[inline(always)]
fn conclude(program: Program, skb: &Skb, verdict: Verdict, seen: &Seen) -> i32 {
    let (reason, action) = match verdict {
        Verdict::Redirect(_, TC_ACT_SHOT) => (Reason::DropRedirect, TC_ACT_SHOT),
        Verdict::Redirect(reason, action) => (reason, action),
        Verdict::Pass(reason) => (reason, TC_ACT_UNSPEC),
        Verdict::Drop(reason) => (reason, TC_ACT_SHOT),
        Verdict::Ignore => return TC_ACT_UNSPEC,
    };
    maps::count(reason, seen.len);
    seen.tell(skb, reason);
    trace::tell(skb, program, reason, seen.len);
    action
}

#[xdp]
pub(crate) fn guard(ctx: XdpContext) -> u32 {
    guard::run(&ctx)
}

#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let seen = Seen::of(&skb);
    let verdict = match from_pod::run(&mut skb) {
        Verdict::Pass(
            reason @ (Reason::PassPodNoPeer | Reason::PassPodNotIpv4 | Reason::PassPodMalformed),
        ) => from_other::of_pod(&skb, reason),
        verdict => verdict,
    };
    conclude(Program::FromPod, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn from_wire(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let seen = Seen::of(&skb);
    let verdict = match from_wire::run(&mut skb) {
        Verdict::Ignore => from_other::run(&skb),
        verdict => verdict,
    };
    conclude(Program::FromWire, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn from_other(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let seen = Seen::of(&skb);
    let verdict = from_other::run(&skb);
    conclude(Program::FromOther, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn from_overlay(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let seen = Seen::of(&skb);
    let verdict = from_overlay::run(&mut skb);
    conclude(Program::FromOverlay, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn to_overlay(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    traffic::leaves_host(&skb);
    let seen = Seen::of(&skb);
    let verdict = observe::outbound(&mut skb);
    conclude(Program::ToOverlay, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn to_wire(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    if skb.take_fast() {
        return TC_ACT_UNSPEC;
    }
    traffic::leaves_host(&skb);
    let seen = Seen::of(&skb);
    let verdict = observe::outbound(&mut skb);
    conclude(Program::ToWire, &skb, verdict, &seen)
}

#[classifier]
pub(crate) fn to_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let seen = Seen::of(&skb);
    let verdict = observe::inbound(&mut skb);
    conclude(Program::ToPod, &skb, verdict, &seen)
}
