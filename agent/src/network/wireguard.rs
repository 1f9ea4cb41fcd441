//! The settings of the wireguard backend.

use super::{
    ConfigError, Object,
    backend::{mtu, short},
    quoted,
};
use crate::{
    uplink::Families,
    wireguard::{OVERHEAD, SecretKey},
};

/// The UDP port of the device that carries IPv4, and of the only one, where none is given.
const LISTEN_PORT: u16 = 51820;
/// The UDP port of the device that carries IPv6 in separate mode, where none is given.
const LISTEN_PORT_V6: u16 = 51821;

/// Settings of the wireguard backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wireguard {
    /// UDP port of `flannel-wg`.
    pub listen_port: u16,
    /// UDP port of `flannel-wg-v6`, which only [`Mode::Separate`] has.
    pub listen_port_v6: u16,
    /// MTU of the underlay in bytes, outer headers included; `None`: that of the uplink.
    pub mtu: Option<u16>,
    /// A secret that all nodes share, mixed into every handshake.
    pub psk: Option<SecretKey>,
    /// Seconds between packets that keep a NAT's entry alive; 0: none are sent.
    pub keepalive: u16,
    /// Which addresses of the nodes carry which packets.
    pub mode: Mode,
}

/// Which addresses of the nodes carry which packets of the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A device for each family: IPv4 between IPv4 addresses, IPv6 between IPv6 ones.
    Separate,
    /// One device for both families, between the addresses that are more likely to be reached.
    Auto,
    /// One device for both families, between IPv4 addresses.
    Ipv4,
    /// One device for both families, between IPv6 addresses.
    Ipv6,
}

impl Wireguard {
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        let keepalive = short(object, "PersistentKeepaliveInterval")?;
        Ok(Self {
            listen_port: short(object, "ListenPort")?.unwrap_or(LISTEN_PORT),
            listen_port_v6: short(object, "ListenPortV6")?.unwrap_or(LISTEN_PORT_V6),
            mtu: mtu(object, OVERHEAD as u16)?,
            psk: psk(object)?,
            keepalive: keepalive.unwrap_or(0),
            mode: mode(object)?,
        })
    }

    /// The rules that depend on the rest of the network config.
    pub(super) fn check(&self, families: Families) -> Result<(), ConfigError> {
        if self.mode == Mode::Ipv6 && !families.v6 {
            return Err(ConfigError(
                r#"Backend.Mode "ipv6" is for networks with EnableIPv6: only their nodes tell an IPv6 address"#
                    .into(),
            ));
        }
        if self.mode == Mode::Ipv4 && !families.v4 {
            return Err(ConfigError(
                r#"Backend.Mode "ipv4" is for networks with EnableIPv4: only their nodes tell an IPv4 address"#
                    .into(),
            ));
        }
        if families.v4
            && families.v6
            && self.mode == Mode::Separate
            && self.listen_port == self.listen_port_v6
        {
            return Err(ConfigError(format!(
                "Backend.ListenPort and Backend.ListenPortV6 are both {}: the two devices of Mode \"separate\" need \
                 ports of their own",
                self.listen_port
            )));
        }
        Ok(())
    }
}

/// The value is never shown, right or wrong.
fn psk(object: &Object) -> Result<Option<SecretKey>, ConfigError> {
    let Some(value) = object.value("PSK") else { return Ok(None) };
    match value.as_str() {
        Some("") => Ok(None),
        Some(text) => match SecretKey::parse(text) {
            Some(key) => Ok(Some(key)),
            None => Err(ConfigError(
                "Backend.PSK must be 32 bytes in base64, as `wg genpsk` or `openssl rand -base64 32` prints them (its \
                 value is not shown)"
                    .into(),
            )),
        },
        None => Err(ConfigError("Backend.PSK must be a string (its value is not shown)".into())),
    }
}

fn mode(object: &Object) -> Result<Mode, ConfigError> {
    match object.string("Mode")? {
        None | Some("" | "separate") => Ok(Mode::Separate),
        Some("auto") => Ok(Mode::Auto),
        Some("ipv4") => Ok(Mode::Ipv4),
        Some("ipv6") => Ok(Mode::Ipv6),
        Some(other) => Err(ConfigError(format!(
            r#"Backend.Mode {} is none of "separate", "auto", "ipv4" and "ipv6""#,
            quoted(other)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Backend, NetworkConfig},
        *,
    };

    /// 32 bytes, none of them zero.
    const PSK: &str = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U=";

    fn read(settings: &str, rest: &str) -> Result<Wireguard, String> {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"wireguard"{settings}}}{rest}}}"#);
        match NetworkConfig::parse(&json) {
            Ok(NetworkConfig { backend: Backend::Wireguard(wireguard), .. }) => Ok(wireguard),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    const DUAL: &str = r#","EnableIPv6":true,"IPv6Network":"fc00::/48""#;

    #[test]
    fn what_is_not_set_is_as_flannels() {
        let defaults = Wireguard {
            listen_port: 51820,
            listen_port_v6: 51821,
            mtu: None,
            psk: None,
            keepalive: 0,
            mode: Mode::Separate,
        };
        assert_eq!(read("", ""), Ok(defaults.clone()));
        let zeros = r#","ListenPort":0,"MTU":0,"PSK":"","PersistentKeepaliveInterval":0,"Mode":null"#;
        assert_eq!(read(zeros, ""), Ok(defaults));
    }

    #[test]
    fn every_key_is_read() {
        let settings = format!(
            r#","ListenPort":1,"listenportv6":2,"MTU":9000,"PSK":"{PSK}","PersistentKeepaliveInterval":25,"Mode":"auto""#
        );
        let wireguard = read(&settings, DUAL).unwrap();
        assert_eq!((wireguard.listen_port, wireguard.listen_port_v6), (1, 2));
        assert_eq!((wireguard.mtu, wireguard.keepalive, wireguard.mode), (Some(9000), 25, Mode::Auto));
        assert_eq!(wireguard.psk, SecretKey::parse(PSK));
        for (text, mode) in [("separate", Mode::Separate), ("ipv4", Mode::Ipv4), ("ipv6", Mode::Ipv6)] {
            assert_eq!(read(&format!(r#","Mode":"{text}""#), DUAL).unwrap().mode, mode);
        }
    }

    #[test]
    fn an_error_names_the_key_the_value_and_the_bound() {
        for (settings, rest, says) in [
            (
                r#","ListenPort":65536"#,
                "",
                "Backend.ListenPort must be a whole number of 0 to 65535, not 65536",
            ),
            (r#","MTU":147"#, "", "Backend.MTU 147 is too small: it is the underlay's MTU, 148 at least"),
            (
                r#","PersistentKeepaliveInterval":"25s""#,
                "",
                "PersistentKeepaliveInterval must be a whole number",
            ),
            (r#","Mode":"both""#, "", r#"Backend.Mode "both" is none of "separate""#),
            (r#","Mode":"ipv6""#, "", r#"Backend.Mode "ipv6" is for networks with EnableIPv6"#),
            (
                r#","Mode":"ipv4""#,
                r#","EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48""#,
                r#"Backend.Mode "ipv4" is for networks with EnableIPv4"#,
            ),
            (r#","ListenPort":51821"#, DUAL, "are both 51821"),
        ] {
            let error = read(settings, rest).unwrap_err();
            assert!(error.contains(says), "{settings}: {error:?} does not say {says:?}");
        }
    }

    #[test]
    fn a_shared_secret_is_never_shown() {
        let shown = format!("{:?}", read(&format!(r#","PSK":"{PSK}""#), "").unwrap());
        assert!(!shown.contains("c2Vjcm") && !shown.contains("115"), "{shown}");
        for wrong in [
            r#""geheimwort""#,
            r#""geheimwortgeheimwortgeheimwortgeheimwort1234""#,
            "314159",
            r#"["geheimwort"]"#,
        ] {
            let error = read(&format!(r#","PSK":{wrong}"#), "").unwrap_err();
            assert!(error.contains("Backend.PSK must be"), "{error}");
            assert!(!error.contains("geheim") && !error.contains("31415"), "{error}");
        }
        let list = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":[{"PSK":"geheimwort"}]}"#);
        let error = list.unwrap_err().to_string();
        assert!(error.contains("Backend must be an object, not a list"), "{error}");
    }
}
