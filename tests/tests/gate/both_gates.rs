//! What holds under both gates is tested under both.

/// Makes a test for each gate and family of a function that is generic over the family and takes the gate:
/// `NAME::strict::v4` and so on; or of one that takes the
/// gate alone, and sees to both families itself.
macro_rules! under_both_gates {
    (dual: $($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn strict() {
                super::$name(crate::STRICT);
            }

            #[test]
            fn open() {
                super::$name(crate::OPEN);
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
