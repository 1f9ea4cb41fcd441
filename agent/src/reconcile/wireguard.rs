//! The wireguard backend's devices and peers: in the kernel, which encrypts, and in the programs' maps, which skip the rest
//! of the host's stack between pod and device.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    time::SystemTime,
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use nix::errno::Errno;

use super::{Reconciler, Work, half::Side};
use crate::{
    dataplane::{PeerPath, Underlay, Way},
    facts,
    family::{Family, V4, V6},
    host::Prefixes,
    kernel::{Kernel, KernelError, WireguardDevice, WireguardSocket, WireguardSpec},
    lease::{Lease, LeaseAttrs, LeaseKey, WireguardData},
    network::{self, Mode},
    overlay::{Desired, Expected, OverlayPeer},
    registry::Cluster,
    status::document,
    uplink::{Families, Uplink},
    wireguard::{
        self, Actual, ActualPeer, DEVICE, DEVICE_V6, Half, OVERHEAD, Peers, Plan, PublicKey, SecretKey,
        Wanted,
    },
};

/// The devices of the wireguard backend.
pub struct Wireguard {
    settings: network::Wireguard,
    key: SecretKey,
    /// This node's, as its lease tells it.
    public_key: PublicKey,
    socket: WireguardSocket,
    /// One for each family, or one for both.
    tunnels: Vec<Tunnel>,
}

/// One device.
pub(super) struct Tunnel {
    half: Half,
    pub(super) spec: WireguardSpec,
    /// UDP port.
    port: u16,
    pub(super) device: WireguardDevice,
    /// What the leases told last of where each peer listens.
    told: BTreeMap<PublicKey, SocketAddr>,
}

impl Tunnel {
    /// Whether it carries a family.
    fn carries<F: Family>(&self) -> bool {
        match self.half {
            Half::V4 => F::BITS == V4::BITS,
            Half::V6 => F::BITS == V6::BITS,
            Half::Both => true,
        }
    }
}

impl Wireguard {
    /// Makes or adopts key and devices. Addresses and peers come with the first pass.
    ///
    /// # Errors
    ///
    /// Where the kernel has no WireGuard, the key file holds no key, or the underlay's MTU leaves pods too little.
    pub(crate) async fn open(
        kernel: &Kernel,
        settings: &network::Wireguard,
        uplink: &Uplink,
        key_file: &Path,
        families: Families,
    ) -> Result<Self> {
        let socket = WireguardSocket::open()?;
        let mtu = mtu(settings, uplink, families)?;
        let key = wireguard::key_file::load_or_create(key_file)?;
        let devices = match settings.mode {
            Mode::Separate => vec![
                (families.v4, Half::V4, DEVICE, settings.listen_port),
                (families.v6, Half::V6, DEVICE_V6, settings.listen_port_v6),
            ],
            Mode::Auto | Mode::Ipv4 | Mode::Ipv6 => vec![(true, Half::Both, DEVICE, settings.listen_port)],
        };
        let mut tunnels = Vec::new();
        for (_, half, name, port) in devices.into_iter().filter(|(wanted, ..)| *wanted) {
            let spec = WireguardSpec { name: name.to_owned(), mtu };
            let device = kernel.ensure_wireguard(&spec).await?;
            tunnels.push(Tunnel { half, spec, port, device, told: BTreeMap::new() });
        }
        let settings = settings.clone();
        let mut opened = Self { settings, key, public_key: PublicKey([0; 32]), socket, tunnels };
        for tunnel in &opened.tunnels {
            let (_, public_key) = opened.set_up(tunnel)?;
            opened.public_key = public_key;
            let (device, mtu, adopted) = (&tunnel.spec.name, tunnel.device.mtu, tunnel.device.adopted);
            tracing::info!(device, adopted, mtu, port = tunnel.port, %public_key, "WireGuard device ready");
        }
        Ok(opened)
    }

    /// Key and port of a device; its peers stay. Says whether something differed, and what the kernel makes of the key.
    fn set_up(&self, tunnel: &Tunnel) -> Result<(bool, PublicKey)> {
        let index = tunnel.device.index;
        let actual = self.socket.device(index)?;
        let plan = Plan { peers: Vec::new(), ..self.plan(tunnel, BTreeMap::new(), &actual) };
        self.apply(tunnel, &plan)?;
        let actual = if plan.is_empty() { actual } else { self.socket.device(index)? };
        let public_key = actual.public_key.with_context(|| format!("{} has no key", tunnel.spec.name))?;
        Ok((!plan.is_empty(), public_key))
    }

    fn plan(&self, tunnel: &Tunnel, peers: BTreeMap<PublicKey, wireguard::Peer>, actual: &Actual) -> Plan {
        let desired = wireguard::Desired {
            private_key: self.key.clone(),
            port: tunnel.port,
            psk: self.settings.psk.clone(),
            keepalive: self.settings.keepalive,
            peers,
        };
        wireguard::plan(&desired, actual, &tunnel.told, SystemTime::now())
    }

    fn apply(&self, tunnel: &Tunnel, plan: &Plan) -> Result<()> {
        self.socket.apply(tunnel.device.index, plan).map_err(|error| taken_port(error, tunnel))
    }

    /// The peers that the leases tell, of each device.
    fn peers_of(&self, own_ipv6: Option<std::net::Ipv6Addr>, leases: &[Lease]) -> Vec<Peers> {
        let peers = |tunnel: &Tunnel| {
            let (settings, half, own_key) = (&self.settings, tunnel.half, self.public_key);
            wireguard::peers(&Wanted { settings, half, own_key, own_ipv6 }, leases)
        };
        self.tunnels.iter().map(peers).collect()
    }

    /// Gives each device its peers; says whether something differed.
    fn set_peers(&mut self, of_devices: Vec<Peers>) -> Result<bool> {
        let mut changed = false;
        for (at, Peers { peers, .. }) in of_devices.into_iter().enumerate() {
            let tunnel = &self.tunnels[at];
            let told = peers.iter().map(|(key, peer)| (*key, peer.endpoint)).collect();
            let plan = self.plan(tunnel, peers, &self.socket.device(tunnel.device.index)?);
            self.apply(tunnel, &plan)?;
            changed |= !plan.is_empty();
            self.tunnels[at].told = told;
        }
        Ok(changed)
    }

    /// The ways of a family's packets into its device, as far as that has the peer.
    fn paths<F: Family>(&self, of_devices: &[Peers], expected: &Expected<F>) -> Vec<PeerPath<F>> {
        let tunnels = self.tunnels.iter().zip(of_devices);
        let Some((tunnel, Peers { peers, .. })) =
            tunnels.into_iter().find(|(tunnel, _)| tunnel.carries::<F>())
        else {
            return Vec::new();
        };
        let allowed: BTreeSet<IpNet> = peers.values().flat_map(|peer| peer.allowed.iter().copied()).collect();
        let is_carried =
            |peer: &&OverlayPeer<F>| allowed.contains(&peer.subnet.into()) && !expected.refuses(peer.subnet);
        let carried = expected.desired().peers.values().filter(is_carried);
        let path = |peer: &OverlayPeer<F>| PeerPath {
            subnet: peer.subnet,
            vtep: peer.vtep,
            vtep_mac: peer.vtep_mac,
            way: Way::Device,
            underlay: Some(Underlay {
                uplink: tunnel.device.index,
                next_hop: F::UNSPECIFIED,
                source: F::UNSPECIFIED,
                mtu: u16::try_from(tunnel.device.mtu).unwrap_or(u16::MAX),
            }),
        };
        carried.map(path).collect()
    }

    fn tunnel<F: Family>(&self) -> Option<&Tunnel> {
        self.tunnels.iter().find(|tunnel| tunnel.carries::<F>())
    }

    /// The devices.
    pub(super) fn tunnels(&self) -> impl Iterator<Item = &Tunnel> {
        self.tunnels.iter()
    }

    /// Interface index of the device that carries a family.
    pub(crate) fn device<F: Family>(&self) -> Option<u32> {
        self.tunnel::<F>().map(|tunnel| tunnel.device.index)
    }

    /// Names of `flannel-wg` and `flannel-wg-v6`, as far as they are there.
    pub(crate) fn device_names(&self) -> (Option<String>, Option<String>) {
        let name = |v6: bool| {
            let found = self.tunnels.iter().find(|tunnel| (tunnel.half == Half::V6) == v6);
            found.map(|tunnel| tunnel.spec.name.clone())
        };
        (name(false), name(true))
    }

    /// The value of this node's lease, with key and ports: those at which it does listen (flannel tells ListenPortV6
    /// also where the only device listens on ListenPort).
    pub(crate) fn complete(&self, attrs: LeaseAttrs) -> LeaseAttrs {
        let public_key = self.public_key;
        let data = |tunnel: Option<&Tunnel>| WireguardData { public_key, port: tunnel.map(|it| it.port) };
        attrs.with_wireguard(data(self.tunnel::<V4>()), data(self.tunnel::<V6>()))
    }

    /// What there is to tell of the devices.
    pub(super) fn report(&self) -> Vec<document::WireguardDevice> {
        let device = |tunnel: &Tunnel| document::WireguardDevice {
            name: tunnel.spec.name.clone(),
            public_key: self.public_key.to_string(),
            mtu: tunnel.device.mtu,
            port: tunnel.port,
        };
        self.tunnels.iter().map(device).collect()
    }

    /// What the kernel tells of the peers now, by key; of two devices, the one that carries IPv4.
    pub(super) fn report_peers(&self) -> BTreeMap<PublicKey, document::WireguardPeer> {
        let now = SystemTime::now();
        let device = self.tunnels.first().map(|tunnel| self.socket.device(tunnel.device.index));
        // What cannot be read is left out: the status is for finding out why.
        let actual = device.and_then(Result::ok).unwrap_or_default();
        let peer = |key: &PublicKey, peer: &ActualPeer| document::WireguardPeer {
            public_key: key.to_string(),
            endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
            handshake_seconds: peer
                .handshake
                .map(|at| now.duration_since(at).unwrap_or_default().as_secs_f64()),
            received_bytes: peer.received,
            sent_bytes: peer.sent,
        };
        actual.peers.iter().map(|(key, found)| (*key, peer(key, found))).collect()
    }

    /// The devices as they ought to be, for those who compare; without secrets.
    pub(super) fn facts(&self) -> Vec<facts::Tunnel> {
        let tunnel = |tunnel: &Tunnel| facts::Tunnel {
            name: tunnel.spec.name.clone(),
            index: tunnel.device.index,
            mtu: tunnel.spec.mtu,
            port: tunnel.port,
            public_key: self.public_key,
            peers: tunnel.told.keys().copied().collect(),
        };
        self.tunnels.iter().map(tunnel).collect()
    }

    /// What the devices should be on another uplink.
    pub(super) fn follow(&mut self, uplink: &Uplink, families: Families) -> Result<()> {
        let mtu = mtu(&self.settings, uplink, families)?;
        self.tunnels.iter_mut().for_each(|tunnel| tunnel.spec.mtu = mtu);
        Ok(())
    }
}

/// MTU of the devices, in bytes.
fn mtu(settings: &network::Wireguard, uplink: &Uplink, families: Families) -> Result<u32> {
    let outer = settings.mtu.map_or(uplink.mtu, u32::from);
    // RFC 791: every host forwards 68 bytes. RFC 8200, section 5: no link of IPv6 may carry less than 1280.
    let (mtu, least) = (outer.saturating_sub(OVERHEAD), if families.v6 { 1280 } else { 68 });
    ensure!(
        mtu >= least,
        "an MTU of {outer} on the underlay leaves {mtu} bytes for pods; at least {least} are needed"
    );
    Ok(mtu)
}

/// The kernel opens the port when the device goes up, or when it is given another.
fn taken_port(error: KernelError, tunnel: &Tunnel) -> anyhow::Error {
    let taken = error.errno() == Some(Errno::EADDRINUSE);
    let error = anyhow::Error::from(error);
    if !taken {
        return error;
    }
    error.context(format!(
        "another socket or device has the UDP port {} of {}: end it (`ss -ulpn`), or choose another in the network config",
        tunnel.port, tunnel.spec.name
    ))
}

impl Reconciler {
    /// The devices, their keys, ports and addresses.
    pub(super) async fn wireguard_devices(&mut self) -> Result<bool> {
        let Some(wireguard) = &mut self.node.wireguard else { return Ok(false) };
        let mut changed = false;
        let before = wireguard.public_key;
        for at in 0..wireguard.tunnels.len() {
            let device = self.kernel.ensure_wireguard(&wireguard.tunnels[at].spec).await?;
            changed |= !device.adopted || !device.corrected.is_empty();
            wireguard.tunnels[at].device = device;
            let (differed, public_key) = wireguard.set_up(&wireguard.tunnels[at])?;
            changed |= differed;
            wireguard.public_key = public_key;
        }
        let new_key = wireguard.public_key != before;
        changed |= self.wireguard_address::<V4>().await?;
        changed |= self.wireguard_address::<V6>().await?;
        if new_key {
            self.publish();
        }
        Ok(changed)
    }

    async fn wireguard_address<F: Side>(&mut self) -> Result<bool> {
        let Some(tunnel) = self.node.wireguard.as_ref().and_then(Wireguard::tunnel::<F>) else {
            return Ok(false);
        };
        let index = tunnel.device.index;
        let Some(half) = F::half(&self.node) else { return Ok(false) };
        let (subnet, networks) = (half.subnet, &self.state.networks);
        let right = self.kernel.has_overlay_address::<F>(index, subnet, networks).await?;
        if !right {
            let set = self.kernel.set_overlay_address::<F>(index, subnet, networks).await;
            set.map_err(|error| taken_port(error, tunnel))?;
        }
        if let Some(half) = F::half_mut(&mut self.node) {
            half.tunnel = Some(index);
        }
        Ok(!right)
    }

    /// The devices' peers, the route of the network, and the programs' maps: off the fast path first, onto it last.
    pub(super) async fn wireguard_peers(&mut self, cluster: &Cluster, work: Work) -> Result<bool> {
        let (mut left_out, mut left_out_v6) = (BTreeMap::new(), BTreeMap::new());
        let v4 = self.desired::<V4>(cluster, peer_of, &mut left_out);
        let v6 = self.desired::<V6>(cluster, peer_of, &mut left_out_v6);
        let mut refused: BTreeSet<String> = left_out.into_values().collect();
        let mut refused_v6: BTreeSet<String> = left_out_v6.into_values().collect();
        if v4.is_none() && v6.is_none() {
            return Ok(false);
        }
        let leases: Vec<Lease> = cluster
            .peers
            .values()
            .filter_map(|lease| {
                let key =
                    LeaseKey { subnet: known(v4.as_ref(), lease), subnet_v6: known(v6.as_ref(), lease) };
                let any = key.subnet.is_some() || key.subnet_v6.is_some();
                any.then(|| Lease { key, ..lease.clone() })
            })
            .collect();
        let own_ipv6 = self.node.uplink.public_ipv6;
        let Some(wireguard) = &self.node.wireguard else { return Ok(false) };
        let of_devices = wireguard.peers_of(own_ipv6, &leases);
        let (v4, v6) = (v4.map(Expected::of), v6.map(Expected::of));
        let paths: Option<Vec<PeerPath<V4>>> = v4.as_ref().map(|v4| {
            wireguard.paths(&of_devices, v4).into_iter().map(|path| self.respect_policies(path)).collect()
        });
        let paths_v6: Option<Vec<PeerPath<V6>>> = v6.as_ref().map(|v6| {
            wireguard.paths(&of_devices, v6).into_iter().map(|path| self.respect_policies(path)).collect()
        });
        let left_out = of_devices.iter().flat_map(|peers| peers.refused.iter().cloned());
        match v4 {
            Some(_) => refused.extend(left_out),
            None => refused_v6.extend(left_out),
        }
        let gone = self.retain_in_maps(paths.as_deref().unwrap_or_default())?;
        let gone_v6 = self.retain_in_maps(paths_v6.as_deref().unwrap_or_default())?;
        let Some(wireguard) = &mut self.node.wireguard else { return Ok(false) };
        // Peers before routes: no packet finds a device that does not know where it goes.
        let mut changed = wireguard.set_peers(of_devices)?;
        if let (Some(v4), Some(paths)) = (v4, paths) {
            check_network(&self.v4.prefixes, v4.desired().network)?;
            changed |= self.program(v4, work, refused).await?;
            changed |= self.put_into_maps(&paths, gone)?;
        }
        if let (Some(v6), Some(paths)) = (v6, paths_v6) {
            check_network(&self.v6.prefixes, v6.desired().network)?;
            changed |= self.program(v6, work, refused_v6).await?;
            changed |= self.put_into_maps(&paths, gone_v6)?;
        }
        Ok(changed)
    }
}

/// The subnet of a lease, where it is one of those that are wanted.
fn known<F: Family>(desired: Option<&Desired<F>>, lease: &Lease) -> Option<F::Net> {
    let subnet = lease.key.half::<F>()?;
    desired?.peers.contains_key(&subnet).then_some(subnet)
}

/// The route of the network takes the place of another like it, and so must not where that is the host's own.
fn check_network<F: Family>(prefixes: &Prefixes<F>, network: F::Net) -> Result<()> {
    ensure!(
        !prefixes.has(F::trunc(network)),
        "this host has a route or an address of its own for the whole network {network}, which the WireGuard device must \
         carry: remove it (`ip route show {network}`), or choose another network"
    );
    Ok(())
}

fn peer_of<F: Side>(this: &Reconciler, lease: &Lease, subnet: F::Net) -> Result<OverlayPeer<F>, String> {
    this.wanted::<F, _>(subnet, || peer(lease, subnet))
}

/// The peer of whom the route's plan and `loden doctor` know; a WireGuard device has no VTEPs.
fn peer<F: Family>(lease: &Lease, subnet: F::Net) -> Result<OverlayPeer<F>> {
    let vtep = lease.attrs.public::<F>();
    let vtep = vtep.with_context(|| format!("its lease has no public {} address", F::NAME))?;
    Ok(OverlayPeer { subnet, vtep, vtep_mac: [0; 6], direct: false })
}
