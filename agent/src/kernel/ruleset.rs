//! Tells when somebody has changed the host's nftables ruleset, by `nft`, by iptables (the nft variant), or by
//! the API. Changes by `iptables-legacy` are not told by the kernel.

use std::io;

use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::{Kernel, Result, group::Group};

/// `NFNLGRP_NFTABLES` as a bit of the socket's groups (`linux/netfilter/nfnetlink.h`).
const GROUP: u32 = 1 << (7 - 1);

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`: the last message of every committed transaction. Others tell
/// what it held; elements that time out or are added by packets have none.
const NEW_GENERATION: u16 = 10 << 8 | 15;

/// The stream of changes of the ruleset, from the moment of its making on.
pub struct RulesetEvents {
    group: Group,
}

impl Kernel {
    /// Begins to listen, on a socket of its own in the network namespace of the calling thread. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`KernelError::Connect`](super::KernelError::Connect) where the kernel grants no socket: it has no nf_tables, or
    /// `CAP_NET_ADMIN` is missing.
    pub fn ruleset_events(&self) -> Result<RulesetEvents> {
        Ok(RulesetEvents { group: Group::join(NETLINK_NETFILTER, GROUP)? })
    }
}

impl RulesetEvents {
    /// Waits until the ruleset has changed since the last call; several changes are one. May be dropped while
    /// it waits without losing a change.
    ///
    /// # Errors
    ///
    /// Where the socket has failed, and a new one must be made.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.group.changed(holds_new_generation).await
    }
}

/// Goes from header to header (length in the first four bytes, type in the next two, aligned to four).
fn holds_new_generation(mut messages: &[u8]) -> bool {
    while let Some(([a, b, c, d, low, high], _)) = messages.split_first_chunk::<6>() {
        if u16::from_ne_bytes([*low, *high]) == NEW_GENERATION {
            return true;
        }
        let length = (u32::from_ne_bytes([*a, *b, *c, *d]) as usize).clamp(16, 1 << 20);
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: usize) -> Vec<u8> {
        let length = 16 + u32::try_from(payload).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(16 + payload.next_multiple_of(4), 0);
        message
    }

    #[test]
    fn a_new_generation_is_found_behind_other_messages() {
        let rule = message(10 << 8 | 6, 21);
        assert!(!holds_new_generation(&rule));
        assert!(holds_new_generation(&[rule, message(NEW_GENERATION, 8)].concat()));
    }

    #[test]
    fn bytes_that_are_no_messages_end_the_search() {
        assert!(!holds_new_generation(&[]));
        assert!(!holds_new_generation(&[0; 5]));
        assert!(!holds_new_generation(&[0; 64]));
        assert!(!holds_new_generation(&[0xff; 64]));
    }
}
