//! The programs of the mode that is like Cilium's tunnel mode.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, LpmTrie, MapData, lpm_trie::Key},
    programs::{SchedClassifier, TcAttachType},
};
use ipnet::Ipv4Net;
use loden_tests::{container::Container, netns::Netns};
use nix::net::if_::if_nametoindex;

/// The VXLAN device of a node.
const DEVICE: &str = "vxlan0";
const VNI: u32 = 2;

/// A node's programs, which leave with their value.
#[derive(Debug)]
pub(super) struct Tunnel {
    // Only held.
    _programs: Ebpf,
}

impl Tunnel {
    /// Makes the device and attaches the programs around it, between the pods and the other node.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub(super) fn create(
        node: &Netns,
        object: &Path,
        pods: &[(String, &Container)],
        (subnet, vtep): (Ipv4Net, Ipv4Addr),
    ) -> Result<Self> {
        node.ip(&format!("link add {DEVICE} mtu 1450 type vxlan external dstport 8472"))?;
        node.ip(&format!("link set {DEVICE} up"))?;
        let object = fs::read(object).with_context(|| object.display().to_string())?;
        let mut values = Vec::new();
        for (veth, pod) in pods {
            values.push((pod.address().octets(), (veth.as_str(), macs(node, veth, pod)?)));
        }
        // An interface is found in the namespace of the thread that asks.
        node.run(|| {
            let device = if_nametoindex(DEVICE)?;
            let mut programs = EbpfLoader::new()
                .override_global("DEVICE", &device, true)
                .override_global("VNI", &VNI, true)
                .load(&object)?;
            let mut nodes: LpmTrie<&mut MapData, [u8; 4], u32> =
                programs.map_mut("NODES").context("no map NODES")?.try_into()?;
            let prefix = Key::new(u32::from(subnet.prefix_len()), subnet.network().octets());
            nodes.insert(&prefix, u32::from(vtep), 0)?;
            let mut map: HashMap<&mut MapData, [u8; 4], [u32; 4]> =
                programs.map_mut("PODS").context("no map PODS")?.try_into()?;
            for (address, (veth, [a, b, c])) in &values {
                map.insert(address, [if_nametoindex(*veth)?, *a, *b, *c], 0)?;
            }
            let inward = program(&mut programs, "tunnel_in")?;
            inward.attach(DEVICE, TcAttachType::Ingress)?;
            let out = program(&mut programs, "tunnel_out")?;
            for (_, (veth, _)) in &values {
                out.attach(veth, TcAttachType::Ingress)?;
            }
            Ok(Self { _programs: programs })
        })
    }
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program: &mut SchedClassifier =
        programs.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    program.load().with_context(|| name.to_owned())?;
    Ok(program)
}

/// The MACs of a frame for the pod, its own and the host side's, as words of memory.
fn macs(node: &Netns, veth: &str, pod: &Container) -> Result<[u32; 3]> {
    let mut bytes = mac(pod.netns(), "eth0")?;
    bytes.extend(mac(node, veth)?);
    let word = |at: usize| -> Result<u32> { Ok(u32::from_ne_bytes(bytes[at..at + 4].try_into()?)) };
    Ok([word(0)?, word(4)?, word(8)?])
}

fn mac(netns: &Netns, interface: &str) -> Result<Vec<u8>> {
    let links: serde_json::Value = serde_json::from_str(&netns.ip(&format!("-json link show {interface}"))?)?;
    let text = links[0]["address"].as_str().with_context(|| format!("{interface} has no address"))?;
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).context(text.to_owned())).collect()
}
