//! Addresses: by a standard plugin, which is told the node's subnets.

use serde_json::{Map, Value, json};

use super::{
    addresses::Addresses,
    delegate::Delegate,
    error::Result,
    lease::Lease,
    request::{Attachment, Command, Conf, Environment, NEWEST, bad_field},
    result,
};

/// The plugin where none is named.
const DEFAULT: &str = "host-local";
/// host-local wants a range even to give an address back, and then does not look at it.
const ANY: &str = "10.0.0.0/8";

/// The address plugin with its configuration.
#[derive(Debug)]
pub struct Ipam<'a> {
    plugin: Delegate<'a>,
    name: String,
    conf: Value,
    /// The same for verbs that are older than 1.1.0, in a version that older plugins know too.
    plain: Value,
}

impl<'a> Ipam<'a> {
    /// From the configuration's `ipam`; host-local gets the lease's subnets unless ranges are given there.
    ///
    /// # Errors
    ///
    /// Code 7 where a field is wrong, 101 where there is no such plugin.
    pub fn new(env: &'a Environment, conf: &Conf, lease: Option<&Lease>) -> Result<Self> {
        let mut ipam = conf.object("ipam")?.cloned().unwrap_or_default();
        let name = match ipam.get("type") {
            None => DEFAULT.to_owned(),
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(bad_field("ipam.type", other, "must be the name of a plugin")),
        };
        ipam.insert("type".into(), name.as_str().into());
        if name == DEFAULT && !ipam.contains_key("ranges") && !ipam.contains_key("subnet") {
            // A range of each family, so that it gives an address of each.
            let mut subnets: Vec<String> =
                lease.into_iter().flat_map(Lease::subnets).map(|subnet| subnet.to_string()).collect();
            if subnets.is_empty() {
                subnets.push(ANY.to_owned());
            }
            let ranges = subnets.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
            ipam.insert("ranges".into(), Value::Array(ranges));
        }
        let mut whole: Map<String, Value> = conf.raw.clone();
        whole.retain(|key, _| !key.eq_ignore_ascii_case("ipam"));
        whole.insert("ipam".into(), Value::Object(ipam));
        whole.entry("cniVersion").or_insert_with(|| conf.version.into());
        let plugin = Delegate::find(env, "ipam.type", &name)?;
        let conf = Value::Object(whole);
        let mut plain = conf.clone();
        if conf["cniVersion"] == NEWEST {
            // What an address plugin is told and answers has not changed since.
            plain["cniVersion"] = "1.0.0".into();
        }
        Ok(Self { plugin, name, conf, plain })
    }

    /// The container's addresses, and what the plugin says of names. What an ADD that broke off may have left is
    /// given back first where it stands in the way.
    ///
    /// # Errors
    ///
    /// Those of the plugin, and code 7 where it gives something else than one address of a family; it is given back then.
    pub fn allocate(&self) -> Result<(Addresses, Option<Value>)> {
        let answer = self.plugin.call(Command::Add, &self.plain).or_else(|first| {
            // The first answer says why; where giving back does not help, it is still true.
            self.release().and_then(|()| self.plugin.call(Command::Add, &self.plain)).map_err(|_| first)
        })?;
        result::allocated(answer.as_ref(), &self.name).inspect_err(|_| {
            let _ = self.release();
        })
    }

    /// Gives the container's address back; that it has none is fine.
    ///
    /// # Errors
    ///
    /// Those of the plugin.
    pub fn release(&self) -> Result<()> {
        self.plugin.call(Command::Del, &self.plain).map(drop)
    }

    /// The same for another container, of which there is nothing left but its name.
    ///
    /// # Errors
    ///
    /// Those of the plugin.
    pub fn release_of(&self, attachment: &Attachment) -> Result<()> {
        self.plugin.delete(attachment, &self.plain)
    }

    /// CHECK.
    ///
    /// # Errors
    ///
    /// Those of the plugin.
    pub fn check(&self) -> Result<()> {
        self.plugin.call(Command::Check, &self.plain).map(drop)
    }

    /// GC or STATUS, where the plugin knows them.
    ///
    /// # Errors
    ///
    /// Those of the plugin.
    pub fn pass_on(&self, command: Command) -> Result<()> {
        self.plugin.call_if_modern(command, &self.conf)
    }
}
