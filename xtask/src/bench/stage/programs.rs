//! The programs that only the bench has, around one node.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, MapData, lpm_trie::Key},
    programs::{SchedClassifier, TcAttachType},
};
use ipnet::Ipv4Net;
use loden_tests::{container::Container, netns::Netns};
use nix::net::if_::if_nametoindex;

use super::pair::{UPLINK, veth};

/// The VXLAN device of a node.
const DEVICE: &str = "vxlan0";
const VNI: u32 = 2;

/// A node's programs, which leave with their value.
#[derive(Debug)]
pub(super) struct Programs {
    // Only held.
    _programs: Ebpf,
}

/// What the programs of a node are for.
pub(super) struct Ends<'a> {
    pub(super) node: &'a Netns,
    pub(super) subnet: Ipv4Net,
    pub(super) pods: &'a [Container],
    /// The other node's subnet, as long as the own one.
    pub(super) other_subnet: Ipv4Net,
    /// Its address on the wire.
    pub(super) other: Ipv4Addr,
}

impl Programs {
    /// Makes a VXLAN device and attaches the programs that encapsulate by it.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub(super) fn tunnel(object: &Path, ends: &Ends<'_>) -> Result<Self> {
        let node = ends.node;
        node.ip(&format!("link add {DEVICE} mtu 1450 type vxlan external dstport 8472"))?;
        node.ip(&format!("link set {DEVICE} up"))?;
        let object = read(object)?;
        let macs = ends.macs()?;
        // An interface is found in the namespace of the thread that asks.
        node.run(|| {
            let device = if_nametoindex(DEVICE)?;
            let mut programs = EbpfLoader::new()
                .override_global("DEVICE", &device, true)
                .override_global("VNI", &VNI, true)
                .load(&object)?;
            let mut nodes: LpmTrie<&mut MapData, [u8; 4], u32> =
                programs.map_mut("NODES").context("no map NODES")?.try_into()?;
            let subnet = ends.other_subnet;
            let prefix = Key::new(u32::from(subnet.prefix_len()), subnet.network().octets());
            nodes.insert(&prefix, u32::from(ends.other), 0)?;
            let mut map: HashMap<&mut MapData, [u8; 4], [u32; 4]> =
                programs.map_mut("PODS").context("no map PODS")?.try_into()?;
            for (address, pod) in ends.entries(&macs)? {
                map.insert(address, pod, 0)?;
            }
            attach(&mut programs, "tunnel_in", &[DEVICE.to_owned()])?;
            attach(&mut programs, "tunnel_out", &ends.veths())?;
            Ok(Self { _programs: programs })
        })
    }

    /// Attaches the programs that redirect and do nothing else.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub(super) fn redirect(object: &Path, ends: &Ends<'_>) -> Result<Self> {
        let object = read(object)?;
        let macs = ends.macs()?;
        let in_memory = |address: Ipv4Addr| u32::from_ne_bytes(address.octets());
        let subnet = ends.other_subnet;
        let other_node = [ends.other, subnet.network(), subnet.netmask()].map(in_memory);
        ends.node.run(|| {
            let uplink = if_nametoindex(UPLINK)?;
            let own_subnet = in_memory(ends.subnet.network());
            let mut programs = EbpfLoader::new()
                .override_global("UPLINK", &uplink, true)
                .override_global("OTHER_NODE", &other_node, true)
                .override_global("OWN_SUBNET", &own_subnet, true)
                .load(&object)?;
            let mut map: Array<&mut MapData, [u32; 4]> =
                programs.map_mut("PODS_BY_BYTE").context("no map PODS_BY_BYTE")?.try_into()?;
            for ([.., last], pod) in ends.entries(&macs)? {
                map.set(last.into(), pod, 0)?;
            }
            attach(&mut programs, "redirect_in", &[UPLINK.to_owned()])?;
            attach(&mut programs, "redirect_out", &ends.veths())?;
            Ok(Self { _programs: programs })
        })
    }
}

impl Ends<'_> {
    /// The host sides of the pods' interfaces.
    fn veths(&self) -> Vec<String> {
        (0..).zip(self.pods).map(|(index, _)| veth(index)).collect()
    }

    /// Of each pod, the MACs of a frame for it, its own and the host side's, as words of memory.
    fn macs(&self) -> Result<Vec<[u32; 3]>> {
        let of_pod = |(veth, pod): (&String, &Container)| {
            let mut bytes = mac(pod.netns(), "eth0")?;
            bytes.extend(mac(self.node, veth)?);
            let word = |at: usize| -> Result<u32> { Ok(u32::from_ne_bytes(bytes[at..at + 4].try_into()?)) };
            Ok([word(0)?, word(4)?, word(8)?])
        };
        self.veths().iter().zip(self.pods).map(of_pod).collect()
    }

    /// Of each pod, its address and what the programs' maps have of it: interface index, then the MACs. To be asked in the
    /// node's namespace.
    fn entries(&self, macs: &[[u32; 3]]) -> Result<Vec<([u8; 4], [u32; 4])>> {
        let entry = |((veth, pod), [a, b, c]): ((&String, &Container), &[u32; 3])| {
            Ok((pod.address().octets(), [if_nametoindex(veth.as_str())?, *a, *b, *c]))
        };
        self.veths().iter().zip(self.pods).zip(macs).map(entry).collect()
    }
}

fn read(object: &Path) -> Result<Vec<u8>> {
    fs::read(object).with_context(|| object.display().to_string())
}

/// Loads a program and attaches it where packets come in by these interfaces.
fn attach(programs: &mut Ebpf, name: &str, interfaces: &[String]) -> Result<()> {
    let program: &mut SchedClassifier =
        programs.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    program.load().with_context(|| name.to_owned())?;
    for interface in interfaces {
        program.attach(interface, TcAttachType::Ingress)?;
    }
    Ok(())
}

fn mac(netns: &Netns, interface: &str) -> Result<Vec<u8>> {
    let links: serde_json::Value = serde_json::from_str(&netns.ip(&format!("-json link show {interface}"))?)?;
    let text = links[0]["address"].as_str().with_context(|| format!("{interface} has no address"))?;
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).context(text.to_owned())).collect()
}
