//! The addresses of a routed pod: one, of either family, or one of each.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use crate::family::Family;

/// A pod's addresses; at least one is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// From a list; `None` for an empty one, and for one with several of a family.
    #[must_use]
    pub fn of(list: &[IpAddr]) -> Option<Self> {
        let v4 = list.iter().find_map(|address| if let IpAddr::V4(it) = address { Some(*it) } else { None });
        let v6 = list.iter().find_map(|address| if let IpAddr::V6(it) = address { Some(*it) } else { None });
        let all = usize::from(v4.is_some()) + usize::from(v6.is_some());
        (all > 0 && all == list.len()).then_some(Self { v4, v6 })
    }

    /// All of them, IPv4's first.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }

    /// That of a family.
    #[must_use]
    pub fn get<F: Family>(self) -> Option<F::Addr> {
        self.iter().find_map(F::addr)
    }
}

/// With a comma between two.
impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.iter().map(|address| address.to_string()).collect();
        f.write_str(&all.join(","))
    }
}

impl FromStr for Addresses {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let all: Result<Vec<IpAddr>, _> = text.split(',').map(str::parse).collect();
        all.ok().and_then(|all| Self::of(&all)).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn one_of_each_family_at_most_and_one_at_least() {
        for text in ["10.5.1.2", "fc00::2", "10.5.1.2,fc00::2"] {
            assert_eq!(text.parse::<Addresses>().unwrap().to_string(), text);
        }
        for text in ["", ",", "10.5.1.2,", "10.5.1.2,10.5.1.3", "fc00::2,fc00::3", "10.5.1.2,fc00::2,fc00::3"]
        {
            assert_eq!(text.parse::<Addresses>(), Err(()), "{text}");
        }
        let both: Addresses = "fc00::2,10.5.1.2".parse().unwrap();
        assert_eq!(both.to_string(), "10.5.1.2,fc00::2", "IPv4's first");
        assert_eq!(both.get::<V4>(), Some(Ipv4Addr::new(10, 5, 1, 2)));
        assert_eq!(both.get::<V6>(), Some("fc00::2".parse().unwrap()));
        assert_eq!("fc00::2".parse::<Addresses>().unwrap().get::<V4>(), None);
    }
}
