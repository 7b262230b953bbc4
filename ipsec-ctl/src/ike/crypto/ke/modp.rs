//! Classic Diffie-Hellman over the MODP groups of RFC 3526, in constant time.

use crypto_bigint::{
    Odd, U512, Uint,
    modular::{FixedMontyForm, FixedMontyParams},
};
use zeroize::Zeroizing;

use super::KeError;

/// The prime of 2048 bits.
const P2048: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AACAA68FFFFFFFFFFFFFFFF";

/// The prime of 3072 bits.
const P3072: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
    ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
    BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A93AD2CAFFFFFFFFFFFFFFFF";

/// The prime of 4096 bits.
const P4096: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
    ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
    BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A92108011A723C12A787E6D7\
    88719A10BDBA5B2699C327186AF4E23C1A946834B6150BDA2583E9CA2AD44CE8DBBBC2DB04DE8EF92E8EFC141FBECAA6\
    287C59474E6BC05D99B2964FA090C3A2233BA186515BE7ED1F612970CEE2D7AFB81BDD762170481CD0069127D5B05AA9\
    93B4EA988D8FDDC186FFB7DC90A6C08F4DF435C934063199FFFFFFFFFFFFFFFF";

/// One group of the three, which differ in nothing but their width.
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

/// `base` to the power of `exponent`, at most 64 bytes, modulo the prime; the time depends on their lengths alone.
fn power<const LIMBS: usize>(base: &Uint<LIMBS>, exponent: &[u8], prime: &str) -> Uint<LIMBS> {
    let mut wide = Zeroizing::new([0; U512::BYTES]);
    let start = wide.len().saturating_sub(exponent.len());
    if let Some(low) = wide.get_mut(start..) {
        low.copy_from_slice(exponent);
    }
    let exponent = Zeroizing::new(U512::from_be_slice(wide.as_ref()));
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
    }
}
