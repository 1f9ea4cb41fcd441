//! The routed mode: what the verbs do.

use std::{net::IpAddr, path::PathBuf};

use serde_json::Value;

use super::{
    check,
    error::{CniError, Result, code},
    ipam::Ipam,
    lease::Lease,
    record::{Record, host_name, parse_mac},
    request::{Attachment, Command, Conf, Environment, bad_field},
    result::Attached,
    sandbox::Sandbox,
    wiring,
};
use crate::{
    dataplane::{Mapped, PinnedDataplane},
    family::{V4, V6},
    kernel::{Kernel, Link, LinkKind, random_mac, sysctl},
};

/// The name by which a configuration asks for this.
pub const TYPE: &str = "loden-cni";
const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const BPFFS_DIR: &str = "/sys/fs/bpf/loden";

/// What of the configuration is this mode's own. What else there is, such as flannel's `delegate`, is the bridge's
/// and means nothing here.
#[derive(Debug)]
struct Settings {
    /// `subnetFile`.
    subnet_file: PathBuf,
    /// `bpffsDir`: the agent's `--bpffs-dir`.
    bpffs_dir: PathBuf,
    /// `mtu`, in bytes; the lease's where it is absent or 0.
    mtu: Option<u32>,
    /// `runtimeConfig.mac`.
    mac: Option<[u8; 6]>,
    /// `runtimeConfig.bandwidth` limits the pod: a plugin of the chain will shape its packets, on the host's end, so
    /// they must come by there.
    is_limited: bool,
}

impl Settings {
    fn read(conf: &Conf) -> Result<Self> {
        let mtu = match conf.fields.value("mtu") {
            None => None,
            // RFC 791: every host takes 68 bytes; an IP packet has at most 65535.
            Some(value) => match value.as_u64() {
                Some(0) => None,
                Some(mtu @ 68..=65535) => Some(mtu as u32),
                _ => return Err(bad_field("mtu", value, "must be a number of bytes of 68 to 65535, or 0")),
            },
        };
        let runtime = conf.object("runtimeConfig")?;
        let mac = match runtime.and_then(|runtime| runtime.get("mac")).filter(|mac| !mac.is_null()) {
            None => None,
            Some(value) => Some(
                value
                    .as_str()
                    .and_then(parse_mac)
                    .filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
                    .ok_or_else(|| bad_field("runtimeConfig.mac", value, "must be a unicast MAC address"))?,
            ),
        };
        let bandwidth = runtime.and_then(|runtime| runtime.get("bandwidth")).and_then(Value::as_object);
        let limits = bandwidth.into_iter().flat_map(|bandwidth| bandwidth.iter());
        Ok(Self {
            subnet_file: conf.path("subnetFile", SUBNET_FILE)?,
            bpffs_dir: conf.path("bpffsDir", BPFFS_DIR)?,
            mtu,
            mac,
            is_limited: limits
                .into_iter()
                .any(|(key, value)| key.ends_with("Rate") && value.as_u64() != Some(0)),
        })
    }
}

/// Does what the runtime asks; the answer is what goes to standard output.
///
/// # Errors
///
/// Those of the configuration, of `subnet.env`, of the address plugin and of the kernel.
pub async fn run(env: &Environment, conf: &Conf) -> Result<Option<Value>> {
    let settings = Settings::read(conf)?;
    match (env.command, &env.attachment) {
        (Command::Add, Some(attachment)) => add(env, conf, &settings, attachment).await.map(Some),
        (Command::Del, Some(attachment)) => delete(env, conf, &settings, attachment).await.map(|()| None),
        (Command::Check, Some(attachment)) => inspect(env, conf, &settings, attachment).await.map(|()| None),
        (Command::Gc, _) => collect(env, conf, &settings).await.map(|()| None),
        (Command::Status, _) => status(env, conf, &settings).map(|()| None),
        _ => Ok(None),
    }
}

async fn add(env: &Environment, conf: &Conf, settings: &Settings, attachment: &Attachment) -> Result<Value> {
    let lease = Lease::read(&settings.subnet_file)?;
    let sandbox = Sandbox::open(env)?;
    let ipam = Ipam::new(env, conf, Some(&lease))?;
    let kernel = Kernel::connect()?;
    if let Some((link, record)) = find(&kernel, &conf.name, attachment).await? {
        if let Some(there) = whole(&kernel, settings, &sandbox, &link, record.as_ref()).await? {
            return there.answer(conf, attachment, sandbox.path(), None);
        }
        // Half made, or in another namespace: begun anew.
        wiring::take_off(&kernel, &settings.bpffs_dir, &link, record.as_ref()).await?;
        ipam.release()?;
    }
    let (addresses, dns) = ipam.allocate()?;
    let attached = Attached {
        host: host_name(&conf.name, attachment),
        host_mac: random_mac(),
        mac: settings.mac.unwrap_or_else(random_mac),
        addresses,
        mtu: settings.mtu.unwrap_or(lease.mtu),
    };
    let record = Record {
        addresses,
        mac: attached.mac,
        network: conf.name.clone(),
        attachment: attachment.clone(),
        pod: pod(env),
    };
    let made = attach(&kernel, settings, &lease, &sandbox, &attached, &record).await;
    match made.and_then(|()| attached.answer(conf, attachment, sandbox.path(), dns)) {
        Ok(answer) => Ok(answer),
        Err(error) => {
            undo(&kernel, settings, &ipam, &record).await;
            Err(error)
        }
    }
}

async fn attach(
    kernel: &Kernel,
    settings: &Settings,
    lease: &Lease,
    sandbox: &Sandbox,
    attached: &Attached,
    record: &Record,
) -> Result<()> {
    attached.addresses.iter().try_for_each(|address| reachable(lease, address))?;
    let index = wiring::wire(kernel, sandbox, attached, record).await?;
    wiring::answer_on_bridges(kernel, lease, attached.addresses).await?;
    // Without programs for this very subnet the kernel carries the packets, and the agent finds the pod.
    let opened = PinnedDataplane::open(&settings.bpffs_dir)?;
    let Some(mut dataplane) = opened.filter(|it| lease.subnets().any(|subnet| subnet == it.subnet())) else {
        return Ok(());
    };
    dataplane.attach(index, &attached.host)?;
    if !settings.is_limited {
        add_endpoint::<V4>(&mut dataplane, attached, index)?;
        add_endpoint::<V6>(&mut dataplane, attached, index)?;
    }
    Ok(())
}

fn add_endpoint<F: Mapped>(dataplane: &mut PinnedDataplane, attached: &Attached, index: u32) -> Result<()> {
    match attached.addresses.get::<F>() {
        Some(address) => Ok(dataplane.set_endpoint::<F>(wiring::endpoint::<F>(attached, address, index))?),
        None => Ok(()),
    }
}

/// An address must be in this node's subnet.
fn reachable(lease: &Lease, address: IpAddr) -> Result<()> {
    if lease.subnets().any(|subnet| subnet.contains(&address)) {
        return Ok(());
    }
    let subnet = lease.subnets().find(|subnet| subnet.addr().is_ipv4() == address.is_ipv4());
    let key = if address.is_ipv4() { "FLANNEL_SUBNET" } else { "FLANNEL_IPV6_SUBNET" };
    let subnet = subnet.map_or_else(|| "(there is none)".to_owned(), |subnet| subnet.to_string());
    let error =
        format!("\"ipam\": {address} is not in this node's subnet {subnet}, so no other node would reach it");
    let details = format!("the subnet is {key} of {}", lease.file.display());
    Err(CniError::new(code::BAD_CONFIG, error).details(details))
}

/// Goes on past failures: the error that led here is the one to tell.
async fn undo(kernel: &Kernel, settings: &Settings, ipam: &Ipam<'_>, record: &Record) {
    if let Ok(Some((link, _))) = find(kernel, &record.network, &record.attachment).await
        && let Err(error) = wiring::take_off(kernel, &settings.bpffs_dir, &link, Some(record)).await
    {
        eprintln!("loden-cni: {error}");
    }
    if let Err(error) = ipam.release() {
        eprintln!("loden-cni: {error}");
    }
}

/// The pod's name, where Kubernetes told it.
fn pod(env: &Environment) -> Option<String> {
    let (namespace, name) = (env.argument("K8S_POD_NAMESPACE")?, env.argument("K8S_POD_NAME")?);
    let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
    (plain(namespace) && plain(name)).then(|| format!("{namespace}/{name}"))
}

/// The host's end of an attachment, and what is noted on it.
///
/// # Errors
///
/// Code 103 where the link is somebody else's.
async fn find(
    kernel: &Kernel,
    network: &str,
    attachment: &Attachment,
) -> Result<Option<(Link, Option<Record>)>> {
    let name = host_name(network, attachment);
    let Some(link) = kernel.link_by_name(&name).await? else { return Ok(None) };
    let record = link.alias.as_deref().and_then(Record::parse);
    let others =
        record.as_ref().is_some_and(|it| (it.network.as_str(), &it.attachment) != (network, attachment));
    if others || link.kind != LinkKind::Veth {
        let alias = link.alias.unwrap_or_default();
        return Err(CniError::new(code::TAKEN, format_args!("link {name} is another's: {alias}")));
    }
    Ok(Some((link, record)))
}

/// What an earlier ADD made in this namespace, if nothing is missing of it.
async fn whole(
    kernel: &Kernel,
    settings: &Settings,
    sandbox: &Sandbox,
    link: &Link,
    record: Option<&Record>,
) -> Result<Option<Attached>> {
    let (Some(record), Some(host_mac)) = (record, link.mac) else { return Ok(None) };
    let attached = Attached {
        host: link.name.clone(),
        host_mac,
        mac: record.mac,
        addresses: record.addresses,
        mtu: link.mtu,
    };
    let damages = check::damages(
        kernel,
        &settings.bpffs_dir,
        sandbox,
        &attached,
        &record.attachment,
        settings.is_limited,
    )
    .await?;
    Ok(damages.is_empty().then_some(attached))
}

async fn delete(env: &Environment, conf: &Conf, settings: &Settings, attachment: &Attachment) -> Result<()> {
    let lease = Lease::read(&settings.subnet_file).ok();
    let ipam = Ipam::new(env, conf, lease.as_ref())?;
    let kernel = Kernel::connect()?;
    match find(&kernel, &conf.name, attachment).await? {
        Some((link, record)) => {
            wiring::take_off(&kernel, &settings.bpffs_dir, &link, record.as_ref()).await?;
        }
        None => forget(&kernel, conf, settings, attachment).await?,
    }
    // Last, so that nobody gets the address while the host still sends it here.
    ipam.release()
}

/// The namespace, and with it the veth, has gone by itself. What the fast path still knows of it is found by the
/// address that ADD answered.
async fn forget(kernel: &Kernel, conf: &Conf, settings: &Settings, attachment: &Attachment) -> Result<()> {
    let Some(previous) = conf.previous()? else { return Ok(()) };
    // DEL takes whatever it gets; where it cannot be read, there is nothing to find.
    let Ok(attached) = Attached::from_previous(previous, attachment) else { return Ok(()) };
    let Some(dataplane) = PinnedDataplane::open(&settings.bpffs_dir)? else { return Ok(()) };
    let ports = [port_of::<V4>(&dataplane, &attached)?, port_of::<V6>(&dataplane, &attached)?];
    for port in ports.into_iter().flatten() {
        if kernel.link_by_index(port).await?.is_none() {
            wiring::forget_endpoints(&settings.bpffs_dir, attached.addresses, port)?;
            crate::dataplane::forget_pod(&settings.bpffs_dir, port)?;
        }
    }
    Ok(())
}

/// Behind which interface the programs know one of the pod's addresses.
fn port_of<F: Mapped>(dataplane: &PinnedDataplane, pod: &Attached) -> Result<Option<u32>> {
    let Some(address) = pod.addresses.get::<F>() else { return Ok(None) };
    let endpoint = dataplane.endpoint::<F>(address)?.filter(|it| it.mac == pod.mac);
    Ok(endpoint.map(|endpoint| endpoint.ifindex))
}

async fn inspect(env: &Environment, conf: &Conf, settings: &Settings, attachment: &Attachment) -> Result<()> {
    let Some(previous) = conf.previous()? else {
        return Err(CniError::new(code::BAD_CONFIG, "\"prevResult\" is missing; CHECK compares with it"));
    };
    let attached = Attached::from_previous(previous, attachment)?;
    let sandbox = Sandbox::open(env)?;
    let lease = Lease::read(&settings.subnet_file).ok();
    Ipam::new(env, conf, lease.as_ref())?.check()?;
    let kernel = Kernel::connect()?;
    let damages =
        check::damages(&kernel, &settings.bpffs_dir, &sandbox, &attached, attachment, settings.is_limited)
            .await?;
    match damages.split_first() {
        None => Ok(()),
        Some((first, rest)) => Err(CniError::new(code::DAMAGED, first).details(rest.join("; "))),
    }
}

/// Takes off everybody on this network whom the runtime does not know. Goes on past failures.
async fn collect(env: &Environment, conf: &Conf, settings: &Settings) -> Result<()> {
    let valid = conf.valid_attachments()?;
    let lease = Lease::read(&settings.subnet_file).ok();
    let ipam = Ipam::new(env, conf, lease.as_ref())?;
    let kernel = Kernel::connect()?;
    let mut errors: Vec<CniError> = Vec::new();
    for link in kernel.links().await? {
        let Some(record) = link.alias.as_deref().and_then(Record::parse) else { continue };
        let known = record.network != conf.name || valid.contains(&record.attachment);
        if known || link.kind != LinkKind::Veth {
            continue;
        }
        let gone = wiring::take_off(&kernel, &settings.bpffs_dir, &link, Some(&record)).await;
        errors.extend(gone.and_then(|()| ipam.release_of(&record.attachment)).err());
    }
    errors.extend(ipam.pass_on(Command::Gc).err());
    match errors.split_first() {
        None => Ok(()),
        Some((first, rest)) => {
            let rest: Vec<String> = rest.iter().map(ToString::to_string).collect();
            Err(CniError { details: rest.join("; "), ..first.clone() })
        }
    }
}

fn status(env: &Environment, conf: &Conf, settings: &Settings) -> Result<()> {
    let lease = Lease::read(&settings.subnet_file)?;
    Ipam::new(env, conf, Some(&lease))?.pass_on(Command::Status)?;
    let v4 = lease.subnet.map(|_| "net.ipv4.ip_forward");
    let v6 = lease.subnet6.map(|_| "net.ipv6.conf.all.forwarding");
    let is_off = |name: &&str| sysctl::get(name).is_ok_and(|value| value == "0");
    match v4.into_iter().chain(v6).find(is_off) {
        Some(forwarding) => Err(CniError::new(
            code::LIMITED,
            format_args!("{forwarding}=0: this host forwards nothing, so its containers reach nobody"),
        )
        .details("the agent sets it to 1 when it runs")),
        None => Ok(()),
    }
}
