//! What the host's firewall must do for the overlay: masquerade what leaves it, let it be forwarded, and, where
//! somebody asks for that, not track what carries it between the nodes.
//!
//! *Masquerade* is an nft table of our own, `table ip loden` (IPv6: `table ip6 loden`), with the meaning of flannel's
//! iptables rules (not of its nft rules, whose fourth hides the sixth). It is replaced as a whole in one transaction.
//! Where others masquerade as well (Docker by itself does what leaves its bridge for whatever other interface), it
//! also keeps them from doing so to what goes to a remote pod, with `--ip-masq` and without.
//! *The underlay's* chains, which take the conntrack off VXLAN (`--notrack-underlay`), are in the same table.
//! *Forward* cannot be a table of our own: an accept ends only the chain that it is in, and where another
//! chain at the same hook drops (Docker sets the policy of iptables' `FORWARD` to DROP) the packet is gone. So
//! an iptables chain `LODEN-FWD` accepts the network, jumped to behind what others have put into `FORWARD` (what an
//! operator denies stays denied). What goes from pod to pod is accepted before Docker's own chains, which drop what they
//! do not know, but behind `DOCKER-USER`, where operators put rules of their own. Without iptables on the host nobody can
//! have set that policy, and there is nothing to do. Native nft chains of others that drop cannot be overruled at all;
//! [`forward_drops`] finds them, to be told to the operator. br_netfilter is not needed.

mod flannel;
mod foreign;
mod forward;
mod iptables;
mod masquerade;
mod tool;
mod underlay;

use std::net::SocketAddr;

use ipnet::IpNet;

use self::masquerade::Masquerade;
pub use self::{
    foreign::{forward_drops, rules},
    tool::FirewallError,
};

/// What this module returns.
pub type Result<T, E = FirewallError> = std::result::Result<T, E>;

/// What the firewall is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirewallSpec {
    /// The whole network.
    pub network: IpNet,
    /// The subnet of this node, of the same family.
    pub subnet: IpNet,
    /// Masquerade what leaves the network (`--ip-masq`).
    pub masquerade: bool,
    /// Choose the source ports of masqueraded connections at random
    /// (not `--ip-masq-fully-random-disable`): two nodes' connections collide less in the connection table.
    pub fully_random: bool,
    /// Let the network be forwarded (`--iptables-forward-rules`).
    pub forward: bool,
    /// Where this node receives VXLAN of this family, if conntrack is to leave it alone (`--notrack-underlay`).
    pub notrack: Option<SocketAddr>,
}

impl FirewallSpec {
    fn half(&self) -> Half {
        Half::of(self.network)
    }
}

/// A half of the host's firewall: each has rules and programs of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Ipv4,
    Ipv6,
}

impl Half {
    const BOTH: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    fn of(network: IpNet) -> Self {
        match network {
            IpNet::V4(_) => Self::Ipv4,
            IpNet::V6(_) => Self::Ipv6,
        }
    }

    /// All multicast addresses.
    fn multicast(self) -> &'static str {
        match self {
            Self::Ipv4 => "224.0.0.0/4",
            Self::Ipv6 => "ff00::/8",
        }
    }

    /// nft's name of the family, in front of tables and addresses.
    fn nft(self) -> &'static str {
        match self {
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
        }
    }
}

/// The firewall rules of this node for one family.
#[derive(Debug)]
pub struct Firewall {
    spec: FirewallSpec,
    masquerade: Masquerade,
    /// What a flanneld had left was looked for.
    taken_over: bool,
}

impl Firewall {
    /// The rules for a node; nothing is touched yet.
    #[must_use]
    pub fn new(spec: FirewallSpec) -> Self {
        Self { spec, masquerade: Masquerade::default(), taken_over: false }
    }

    /// What the rules are to do from the next [`Self::ensure`] on.
    pub fn set_spec(&mut self, spec: FirewallSpec) {
        self.spec = spec;
    }

    /// Sees to it that the rules are there, once each and in the right place, and says whether anything had to
    /// be done. Rules that are right are only read.
    ///
    /// # Errors
    ///
    /// [`FirewallError`], where `nft` is needed and missing, or a tool says no. The other half is done all the
    /// same.
    pub async fn ensure(&mut self) -> Result<bool> {
        let masquerade = self.masquerade.ensure(&self.spec).await;
        let forward = forward::ensure(&self.spec).await;
        let changed = masquerade? | forward?;
        self.take_over().await?;
        Ok(changed)
    }

    /// Once, when our own rules are in place: if a flanneld still runs here, it will not be fought.
    async fn take_over(&mut self) -> Result<()> {
        if self.spec.masquerade && !self.taken_over {
            if flannel::take_over(&self.spec).await? {
                tracing::info!(network = %self.spec.network, "flannel's masquerade rules are removed, ours are in place");
            }
            self.taken_over = true;
        }
        Ok(())
    }

    /// Whether the rules are as [`Self::ensure`] left them. `false` before the first time.
    ///
    /// # Errors
    ///
    /// As [`Self::ensure`].
    pub async fn is_current(&self) -> Result<bool> {
        Ok(self.masquerade.is_current(&self.spec).await? && forward::is_current(&self.spec).await?)
    }

    /// Puts rules that are flannel's in the place of ours, as far as ours are there, for a flanneld that takes the
    /// node back; packets fare the same at every moment. Goes on after a failure and returns all of them; what could
    /// not be replaced stays.
    pub async fn hand_back(network: IpNet, subnet: IpNet) -> Vec<FirewallError> {
        let (network, subnet) = (network.trunc(), subnet.trunc());
        let masquerade = flannel::hand_back_masquerade(network, subnet).await;
        let forward = flannel::hand_back_forward(network).await;
        [masquerade, forward].into_iter().filter_map(Result::err).collect()
    }

    /// Removes the rules of ours of this network's family, and nothing else; goes on after a failure and returns all of
    /// them.
    pub async fn withdraw(network: IpNet) -> Vec<FirewallError> {
        let half = Half::of(network);
        let (masquerade, forward) = (masquerade::remove(half).await, forward::remove(half).await);
        [masquerade, forward].into_iter().filter_map(Result::err).collect()
    }

    /// Removes all rules of ours, also those of an earlier run, and nothing else; goes on after a failure and
    /// returns all of them.
    pub async fn remove() -> Vec<FirewallError> {
        let mut errors = Vec::new();
        for half in Half::BOTH {
            errors.extend(masquerade::remove(half).await.err());
            errors.extend(forward::remove(half).await.err());
        }
        errors
    }
}
