//! The `Backend` object of the network config.

use super::{ConfigError, Object, Wireguard, quoted};

/// The VNI that flannel takes where none is given.
pub const DEFAULT_VNI: u32 = 1;
/// The UDP port that the kernel takes where none is given, and so flannel (not IANA's 4789).
pub const DEFAULT_PORT: u16 = 8472;
/// VNIs have 24 bits (RFC 7348, section 5).
const MAX_VNI: u64 = (1 << 24) - 1;
/// What VXLAN over IPv4 takes of the underlay's MTU, in bytes.
const OVERHEAD: u16 = 50;
/// IPv4's least MTU, in bytes (RFC 791).
const MIN_MTU: u16 = 68;

/// How packets travel between nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Encapsulated in VXLAN.
    Vxlan(Vxlan),
    /// Routed by the nodes themselves, which share a layer 2.
    HostGw,
    /// Only leases: somebody else routes.
    Alloc,
    /// Encrypted, by the kernel's WireGuard.
    Wireguard(Wireguard),
}

/// Settings of the vxlan backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits; also the number in the device's name.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// MTU of the underlay in bytes, outer headers included; `None`: that of the uplink.
    pub mtu: Option<u16>,
    /// Whether peers on the same layer 2 are routed to without encapsulation.
    pub direct_routing: bool,
    /// Whether the device carries the group policy extension.
    pub gbp: bool,
    /// Whether the device learns addresses from what it receives.
    pub learning: bool,
}

impl Default for Vxlan {
    fn default() -> Self {
        let (vni, port) = (DEFAULT_VNI, DEFAULT_PORT);
        Self { vni, port, mtu: None, direct_routing: false, gbp: false, learning: false }
    }
}

impl Backend {
    /// What `BackendType` says in a lease; flannel's alloc leases have none.
    #[must_use]
    pub fn lease_type(&self) -> &'static str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
            Self::Alloc => "",
            Self::Wireguard(_) => "wireguard",
        }
    }

    pub(super) fn read(config: &Object) -> Result<Self, ConfigError> {
        let Some(object) = config.object("Backend", "Backend.")? else {
            return Ok(Self::Vxlan(Vxlan::default()));
        };
        match object.string("Type")?.unwrap_or_default().to_lowercase().as_str() {
            "vxlan" => Vxlan::read(&object).map(Self::Vxlan),
            "host-gw" => Ok(Self::HostGw),
            "alloc" => Ok(Self::Alloc),
            "wireguard" => Wireguard::read(&object).map(Self::Wireguard),
            other => Err(ConfigError(format!(
                r#"Backend.Type {} is not supported: use "vxlan", "host-gw", "wireguard" or "alloc", or leave Backend out for vxlan"#,
                quoted(other)
            ))),
        }
    }
}

impl Vxlan {
    fn read(object: &Object) -> Result<Self, ConfigError> {
        let vni = object.unsigned("VNI", MAX_VNI)?.and_then(|vni| u32::try_from(vni).ok());
        Ok(Self {
            vni: vni.unwrap_or(DEFAULT_VNI),
            port: short(object, "Port")?.unwrap_or(DEFAULT_PORT),
            mtu: mtu(object, OVERHEAD)?,
            direct_routing: object.bool("DirectRouting")?.unwrap_or(false),
            gbp: object.bool("GBP")?.unwrap_or(false),
            learning: object.bool("Learning")?.unwrap_or(false),
        })
    }
}

/// A number of 16 bits; zero means not set, as in Go.
pub(super) fn short(object: &Object, key: &'static str) -> Result<Option<u16>, ConfigError> {
    let number = object.unsigned(key, u16::MAX.into())?;
    Ok(number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0))
}

/// The underlay's MTU, of which a backend takes `overhead` bytes.
pub(super) fn mtu(object: &Object, overhead: u16) -> Result<Option<u16>, ConfigError> {
    let mtu = short(object, "MTU")?;
    let least = MIN_MTU + overhead;
    match mtu {
        Some(mtu) if mtu < least => Err(ConfigError(format!(
            "Backend.MTU {mtu} is too small: it is the underlay's MTU, {least} at least, {overhead} more than the containers get"
        ))),
        mtu => Ok(mtu),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::NetworkConfig, *};

    fn read(backend: &str) -> Result<Backend, String> {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#);
        NetworkConfig::parse(&json).map(|config| config.backend).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let backend = read(
            r#"{"Type":"vxlan","VNI":16777215,"Port":4789,"MTU":9001,"DirectRouting":true,"GBP":true,"Learning":true}"#,
        );
        let (mtu, direct_routing, gbp, learning) = (Some(9001), true, true, true);
        let all = Vxlan { vni: 16_777_215, port: 4789, mtu, direct_routing, gbp, learning };
        assert_eq!(backend, Ok(Backend::Vxlan(all)));
        assert_eq!(read(r#"{"Type":"host-gw"}"#), Ok(Backend::HostGw));
        assert_eq!(read(r#"{"Type":"Alloc"}"#), Ok(Backend::Alloc));
        assert_eq!(read(r#"{"Type":"vxlan","Port":0,"MTU":0}"#), Ok(Backend::Vxlan(Vxlan::default())));
    }

    #[test]
    fn an_error_names_the_key_the_value_and_the_bound() {
        for (backend, says) in [
            (r#""vxlan""#, r#"Backend must be an object, not "vxlan""#),
            (r"{}", r#"Backend.Type "" is not supported"#),
            (r#"{"Type":"udp"}"#, r#"Backend.Type "udp" is not supported: use "vxlan""#),
            (
                r#"{"Type":"vxlan","VNI":16777216}"#,
                "Backend.VNI must be a whole number of 0 to 16777215, not 16777216",
            ),
            (r#"{"Type":"vxlan","VNI":1.5}"#, "Backend.VNI must be a whole number of 0 to 16777215, not 1.5"),
            (
                r#"{"Type":"vxlan","Port":65536}"#,
                "Backend.Port must be a whole number of 0 to 65535, not 65536",
            ),
            (r#"{"Type":"vxlan","MTU":117}"#, "Backend.MTU 117 is too small"),
            (r#"{"Type":"vxlan","DirectRouting":1}"#, "Backend.DirectRouting must be true or false, not 1"),
        ] {
            let error = read(backend).unwrap_err();
            assert!(error.contains(says), "{backend}: {error:?} does not say {says:?}");
        }
    }
}
