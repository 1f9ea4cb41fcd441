//! `loden cleanup`: removes what the agent has left on this host, and nothing else. A failure is noted, and it
//! goes on.

use anyhow::Result;

use crate::{
    config::Config,
    dataplane, facts,
    firewall::Firewall,
    kernel::{
        Kernel,
        sysctl::{self, SysctlError},
    },
    run,
    state::State,
    subnet_file,
};

/// Removes programs, links and maps; unless `keep_kernel`, also routes, device, rules and subnet.env, and puts
/// sysctls back. Returns what could not be done.
///
/// With `keep_kernel` the node is left as flannel leaves it: device, lease and subnet.env as they are, routes and
/// firewall rules as flannel's, sysctls as they are (connections that were fast go on through conntrack, which has
/// not seen all of them).
///
/// # Errors
///
/// Where an agent still runs, or the kernel grants no netlink socket.
pub async fn run(config: &Config, keep_kernel: bool) -> Result<Vec<String>> {
    let _lock = run::lock(&config.run_dir)?;
    let state = State::read(&config.run_dir)?;
    let mut errors: Vec<String> =
        dataplane::detach_all(&config.bpffs_dir).iter().map(ToString::to_string).collect();
    println!("programs, links and maps below {} removed", config.bpffs_dir.display());
    match Kernel::connect()?.ask_for_no_room().await {
        Ok(links) => links.iter().for_each(|link| println!("link {link} removed")),
        Err(error) => errors.push(error.to_string()),
    }
    if keep_kernel {
        errors.extend(hand_back(config, &state).await?);
        // What is flannel's from now on is nothing that a later cleanup may take.
        return forgotten(config, errors);
    }
    let devices = state.device.iter().chain(&state.device_v6).chain(&state.stale_devices).map(String::as_str);
    let removed = Kernel::connect()?.remove_overlay(devices, &state.networks).await;
    for done in removed.done {
        println!("{done}");
    }
    errors.extend(removed.errors.iter().map(ToString::to_string));
    errors.extend(Firewall::remove().await.iter().map(ToString::to_string));
    println!("firewall rules removed");
    for (name, before) in &state.sysctls {
        match sysctl::set(name, before) {
            Ok(()) => println!("{name} put back to {before}"),
            // Its interface or its module has gone, and the value with it.
            Err(SysctlError::Absent { .. }) => {}
            Err(error) => errors.push(error.to_string()),
        }
    }
    let (socket, facts) = (config.run_dir.join("control.sock"), facts::path(&config.run_dir));
    // Where no agent of ours has left anything, the file is another's.
    let subnet_file = (state != State::default()).then_some(&config.subnet_file);
    for path in [&socket, &facts].into_iter().chain(subnet_file) {
        match std::fs::remove_file(path) {
            Ok(()) => println!("{} removed", path.display()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => errors.push(format!("{}: {error}", path.display())),
        }
    }
    if config.wireguard_key_file.exists() {
        println!(
            "{} stays: other nodes know this one by it, and an agent that comes back uses it; remove it where none will",
            config.wireguard_key_file.display()
        );
    }
    forgotten(config, errors)
}

/// Nothing is left to undo, unless something could not be done.
fn forgotten(config: &Config, errors: Vec<String>) -> Result<Vec<String>> {
    if errors.is_empty() {
        State::remove(&config.run_dir)?;
    }
    Ok(errors)
}

/// Makes routes and rules flannel's; returns what could not be done.
async fn hand_back(config: &Config, state: &State) -> Result<Vec<String>> {
    let mut errors = Vec::new();
    match Kernel::connect()?.hand_back_routes(&state.networks).await {
        Ok(routes) => println!("{routes} routes handed back to flannel"),
        Err(error) => errors.push(error.to_string()),
    }
    let file = &config.subnet_file;
    let (v4, v6) = match (subnet_file::previous_ipv4(file), subnet_file::previous_ipv6(file)) {
        (Ok(v4), Ok(v6)) => (v4, v6),
        (Err(error), _) | (_, Err(error)) => {
            errors.push(format!("the firewall rules stay: {error}"));
            return Ok(errors);
        }
    };
    if v4.is_none() && v6.is_none() {
        errors.push(format!(
            "the firewall rules stay: {} does not say FLANNEL_NETWORK and FLANNEL_SUBNET, nor the two of IPv6",
            file.display()
        ));
        return Ok(errors);
    }
    let mut failed = Vec::new();
    if let Some((network, subnet)) = v4 {
        failed.extend(Firewall::hand_back(network.into(), subnet.into()).await);
    }
    if let Some((network, subnet)) = v6 {
        failed.extend(Firewall::hand_back(network.into(), subnet.into()).await);
    }
    if failed.is_empty() {
        println!("firewall rules handed back to flannel");
    }
    errors.extend(failed.iter().map(ToString::to_string));
    Ok(errors)
}
