//! Classic Diffie-Hellman over the MODP groups of RFC 3526, in constant time.

use crypto_bigint::{
    Odd, U640, Uint,
    modular::{FixedMontyForm, FixedMontyParams},
};
use zeroize::Zeroizing;

use super::KeError;

/// How the primes begin: 64 bits of ones, then pi, as far as two of them agree (RFC 3526).
macro_rules! beginning {
    (2048) => {
        "\
         FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
         EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
         EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
         83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
         E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
         15728E5A8AA"
    };
    (3072) => {
        concat!(
            beginning!(2048),
            "\
             AC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7ABF5AE8CDB0\
             933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200CBBE117577A6\
             15D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A9"
        )
    };
    (4096) => {
        concat!(
            beginning!(3072),
            "\
             2108011A723C12A787E6D788719A10BDBA5B2699C327186AF4E23C1A946834B6150BDA2583E9CA2AD44CE8DBBBC2DB04\
             DE8EF92E8EFC141FBECAA6287C59474E6BC05D99B2964FA090C3A2233BA186515BE7ED1F612970CEE2D7AFB81BDD7621\
             70481CD0069127D5B05AA993B4EA988D8FDDC186FFB7DC90A6C08F4DF435C9340"
        )
    };
    (6144) => {
        concat!(
            beginning!(4096),
            "\
             2849236C3FAB4D27C7026C1D4DCB2602646DEC9751E763DBA37BDF8FF9406AD9E530EE5DB382F413001AEB06A53ED902\
             7D831179727B0865A8918DA3EDBEBCF9B14ED44CE6CBACED4BB1BDB7F1447E6CC254B332051512BD7AF426FB8F401378\
             CD2BF5983CA01C64B92ECF032EA15D1721D03F482D7CE6E74FEF6D55E702F46980C82B5A84031900B1C9E59E7C97FBEC\
             7E8F323A97A7E36CC88BE0F1D45B7FF585AC54BD407B22B4154AACC8F6D7EBF48E1D814CC5ED20F8037E0A79715EEF29\
             BE32806A1D58BB7C5DA76F550AA3D8A1FBFF0EB19CCB1A313D55CDA56C9EC2EF29632387FE8D76E3C0468043E8F663F4\
             860EE12BF2D5B0B7474D6E694F91E6D"
        )
    };
}

/// The prime of 2048 bits.
const P2048: &str = concat!(beginning!(2048), "CAA68FFFFFFFFFFFFFFFF");

/// The prime of 3072 bits.
const P3072: &str = concat!(beginning!(3072), "3AD2CAFFFFFFFFFFFFFFFF");

/// The prime of 4096 bits.
const P4096: &str = concat!(beginning!(4096), "63199FFFFFFFFFFFFFFFF");

/// The prime of 6144 bits.
const P6144: &str = concat!(beginning!(6144), "CC4024FFFFFFFFFFFFFFFF");

/// The prime of 8192 bits.
const P8192: &str = concat!(
    beginning!(6144),
    "\
     BE115974A3926F12FEE5E438777CB6A932DF8CD8BEC4D073B931BA3BC832B68D9DD300741FA7BF8AFC47ED2576F6936B\
     A424663AAB639C5AE4F5683423B4742BF1C978238F16CBE39D652DE3FDB8BEFC848AD922222E04A4037C0713EB57A81A\
     23F0C73473FC646CEA306B4BCBC8862F8385DDFA9D4B7FA2C087E879683303ED5BDD3A062B3CF5B3A278A66D2A13F83F\
     44F82DDF310EE074AB6A364597E899A0255DC164F31CC50846851DF9AB48195DED7EA1B1D510BD7EE74D73FAF36BC31E\
     CFA268359046F4EB879F924009438B481C6CD7889A002ED5EE382BC9190DA6FC026E479558E4475677E9AA9E3050E276\
     5694DFC81F56E880B96E7160C980DD98EDD3DFFFFFFFFFFFFFFFFF"
);

/// One group of the five, which differ in nothing but their width.
macro_rules! group {
    ($width:ident, $prime:ident, $public:ident, $agree:ident) => {
        /// The public value of a private exponent.
        pub(super) fn $public(exponent: &[u8]) -> Vec<u8> {
            power(
                &Uint::<{ crypto_bigint::$width::LIMBS }>::from_u8(2),
                exponent,
                $prime,
            )
            .to_be_bytes()
            .as_ref()
            .to_vec()
        }

        /// The secret shared with the owner of `public`.
        pub(super) fn $agree(
            exponent: &[u8],
            public: &[u8],
        ) -> Result<Zeroizing<Vec<u8>>, KeError> {
            type Number = Uint<{ crypto_bigint::$width::LIMBS }>;
            if public.len() != Number::BYTES {
                return Err(KeError::Length);
            }
            let base = Number::from_be_slice(public);
            // RFC 6989 section 2.1: 1 < r < p - 1.
            let last = Number::from_be_hex($prime).wrapping_sub(&Number::ONE);
            if base <= Number::ONE || base >= last {
                return Err(KeError::Value);
            }
            let shared = Zeroizing::new(power(&base, exponent, $prime));
            Ok(Zeroizing::new(shared.to_be_bytes().as_ref().to_vec()))
        }
    };
}

group!(U2048, P2048, public_2048, agree_2048);
group!(U3072, P3072, public_3072, agree_3072);
group!(U4096, P4096, public_4096, agree_4096);
group!(U6144, P6144, public_6144, agree_6144);
group!(U8192, P8192, public_8192, agree_8192);

/// `base` to the power of `exponent`, at most 80 bytes, modulo the prime; the time depends on their lengths alone.
fn power<const LIMBS: usize>(base: &Uint<LIMBS>, exponent: &[u8], prime: &str) -> Uint<LIMBS> {
    let mut wide = Zeroizing::new([0; U640::BYTES]);
    let start = wide.len().saturating_sub(exponent.len());
    if let Some(low) = wide.get_mut(start..) {
        low.copy_from_slice(exponent);
    }
    let exponent = Zeroizing::new(U640::from_be_slice(wide.as_ref()));
    let modulus = Odd::<Uint<LIMBS>>::from_be_hex(prime);
    FixedMontyForm::new(base, &FixedMontyParams::new_vartime(modulus))
        .pow(&*exponent)
        .retrieve()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether 2 passes Fermat's test for the prime and for its half, and the outer words are all ones.
    fn is_safe<const LIMBS: usize>(prime: &str) {
        assert!(
            prime.starts_with("FFFFFFFFFFFFFFFFC90FDAA22168C234"),
            "pi begins so"
        );
        assert!(prime.ends_with("FFFFFFFFFFFFFFFF"));
        let number = Uint::<LIMBS>::from_be_hex(prime);
        let half = number.shr_vartime(1);
        let two = Uint::<LIMBS>::from_u8(2);
        for modulus in [number, half] {
            let odd = Odd::new(modulus).expect("a prime is odd");
            let exponent = modulus.wrapping_sub(&Uint::ONE);
            let power = FixedMontyForm::new(&two, &FixedMontyParams::new_vartime(odd))
                .pow_vartime(&exponent)
                .retrieve();
            assert_eq!(power, Uint::ONE);
        }
    }

    // RFC 3526: p and (p - 1) / 2 are primes, and the outer 64 bits of p are ones.
    #[test]
    fn the_primes_are_safe_primes_of_the_form_that_the_rfc_gives() {
        is_safe::<{ crypto_bigint::U2048::LIMBS }>(P2048);
        is_safe::<{ crypto_bigint::U3072::LIMBS }>(P3072);
        is_safe::<{ crypto_bigint::U4096::LIMBS }>(P4096);
        is_safe::<{ crypto_bigint::U6144::LIMBS }>(P6144);
        is_safe::<{ crypto_bigint::U8192::LIMBS }>(P8192);
    }
}
