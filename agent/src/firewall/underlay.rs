//! The chains that keep conntrack from the packets between the nodes: VXLAN's source ports differ by flow, so that none
//! of these packets is ever the reply to another, and what conntrack learns of them serves nobody.

use std::net::SocketAddr;

use super::Half;

/// Both chains for the address and port at which this node receives VXLAN. Only its own packets: what the host forwards
/// to that port (an overlay inside of a virtual machine, say) may need NAT, which is conntrack's.
pub(super) fn chains(half: Half, vtep: SocketAddr) -> String {
    let (ip, address, port) = (half.nft(), vtep.ip(), vtep.port());
    format!(
        "\
\tchain underlay-in {{
\t\ttype filter hook prerouting priority raw; policy accept;
\t\t{ip} daddr {address} udp dport {port} notrack comment \"VXLAN from peers\"
\t}}

\tchain underlay-out {{
\t\ttype filter hook output priority raw; policy accept;
\t\t{ip} saddr {address} udp dport {port} notrack comment \"VXLAN to peers\"
\t}}
"
    )
}
