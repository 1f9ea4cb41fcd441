//! Entry points, and what they have in common.

mod from_overlay;
mod from_pod;
mod from_wire;
mod gate;
mod globals;
mod guard;
mod lookup;
mod maps;
mod observe;
mod skb;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use loden_ebpf::reason::Reason;

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

/// Counts the verdict and turns it into what the kernel wants. `TC_ACT_UNSPEC` lets other programs at the hook
/// run; on TCX it means "next".
#[inline(always)]
fn conclude(verdict: Verdict, len: u32) -> i32 {
    match verdict {
        Verdict::Redirect(reason, action) => {
            if action == TC_ACT_SHOT {
                maps::count(Reason::DropRedirect, len);
            } else {
                maps::count(reason, len);
            }
            action
        }
        Verdict::Pass(reason) => {
            maps::count(reason, len);
            TC_ACT_UNSPEC
        }
        Verdict::Drop(reason) => {
            maps::count(reason, len);
            TC_ACT_SHOT
        }
        Verdict::Ignore => TC_ACT_UNSPEC,
    }
}

#[xdp]
pub(crate) fn guard(ctx: XdpContext) -> u32 {
    guard::run(&ctx)
}

#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    conclude(from_pod::run(&mut skb), len)
}

#[classifier]
pub(crate) fn from_wire(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    conclude(from_wire::run(&mut skb), len)
}

#[classifier]
pub(crate) fn from_overlay(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    conclude(from_overlay::run(&mut skb), len)
}

#[classifier]
pub(crate) fn to_overlay(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    conclude(observe::outbound(&mut skb), len)
}

#[classifier]
pub(crate) fn to_wire(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    if skb.take_fast() {
        return TC_ACT_UNSPEC;
    }
    conclude(observe::outbound(&mut skb), len)
}

#[classifier]
pub(crate) fn to_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx);
    let len = skb.len();
    conclude(observe::inbound(&mut skb), len)
}
