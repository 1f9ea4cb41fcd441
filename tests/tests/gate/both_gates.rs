//! What holds under both gates is tested under both.

/// Makes a test for each gate and family of a function that is generic over the family and takes the gate:
/// `NAME::strict::v4` and so on; or for IPv4 alone.
macro_rules! under_both_gates {
    (IPv4: $($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn strict() {
                super::$name::<loden_tests::packet::Ipv4>(crate::STRICT);
            }

            #[test]
            fn open() {
                super::$name::<loden_tests::packet::Ipv4>(crate::OPEN);
            }
        })+
    };
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            mod strict {
                #[test]
                fn v4() {
                    super::super::$name::<loden_tests::packet::Ipv4>(crate::STRICT);
                }

                #[test]
                fn v6() {
                    super::super::$name::<loden_tests::packet::Ipv6>(crate::STRICT);
                }
            }

            mod open {
                #[test]
                fn v4() {
                    super::super::$name::<loden_tests::packet::Ipv4>(crate::OPEN);
                }

                #[test]
                fn v6() {
                    super::super::$name::<loden_tests::packet::Ipv6>(crate::OPEN);
                }
            }
        })+
    };
}
pub(crate) use under_both_gates;
