//! Multiplication of a peer's point on P-521, in less than two thirds of the time that the `p521` crate takes.
//!
//! The field is that of the crate. What differs are the coordinates: Jacobian ones, in which a doubling, of which there are 520,
//! takes eight multiplications, where the complete formulas in homogeneous ones take thirteen and many more additions.
//! Only the last addition may be of two points that are the same, so that one is made by a complete formula. The time does
//! not depend on the scalar: none of its digits is zero, each reads all of the table, and nothing branches.

use p521::{
    NistP521,
    elliptic_curve::{
        hazmat::FieldArithmetic,
        subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _},
    },
};
use zeroize::Zeroizing;

type Element = <NistP521 as FieldArithmetic>::FieldElement;

/// Bytes of a coordinate and of a scalar.
pub(super) const BYTES: usize = 66;
/// Bits that one digit of the scalar stands for.
const WINDOW: usize = 5;
/// Odd multiples of the point that a digit may ask for: 1, 3, .. 31.
const MULTIPLES: usize = 1 << (WINDOW - 1);
/// Digits below the highest one, which is always 1.
const DIGITS: usize = 520 / WINDOW;

/// The order of the group.
// RFC 5903 section 3.3.
const ORDER: [u8; BYTES] = [
    0x01, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xfa, 0x51, 0x86, 0x87, 0x83, 0xbf, 0x2f, 0x96, 0x6b, 0x7f, 0xcc, 0x01, 0x48, 0xf7, 0x09,
    0xa5, 0xd0, 0x3b, 0xb5, 0xc9, 0xb8, 0x89, 0x9c, 0x47, 0xae, 0xbb, 0x6f, 0xb7, 0x1e, 0x91, 0x38,
    0x64, 0x09,
];

/// The x coordinate of a multiple of the point (x, y), which is on the curve. The scalar is neither zero nor the order or
/// more.
pub(super) fn multiply(
    scalar: &[u8; BYTES],
    x: &[u8; BYTES],
    y: &[u8; BYTES],
) -> Option<Zeroizing<Vec<u8>>> {
    let x = Element::from_slice(x).ok()?;
    let y = Element::from_slice(y).ok()?;
    // y^2 = x^3 - 3x + b
    let b = y.square() - x.square() * x + (x.double() + x);
    let point = Point {
        x,
        y,
        z: Element::ONE,
    };
    let table = Table::of(point);
    let scalar = odd(scalar);
    let mut sum = point;
    for digit in (1..DIGITS).rev() {
        // The sum is a multiple of the point by less than the order / 32, so it is not the one at infinity; by 32 at least once it
        // is doubled, so it is neither the digit's nor the opposite of that.
        sum = sum.shifted().add(&table.multiple(bits_of(&scalar, digit)));
    }
    let last = table.multiple(bits_of(&scalar, 0));
    let (x, z) = add_completely(&sum.shifted(), &last, &b);
    let inverse = Option::<Element>::from(z.invert())?;
    Some(Zeroizing::new(x.multiply(&inverse).to_bytes().to_vec()))
}

/// Of a scalar and its opposite, whose multiples have the same x coordinate, the one that is odd.
fn odd(scalar: &[u8; BYTES]) -> Zeroizing<[u8; BYTES]> {
    let is_even = Choice::from(!scalar[BYTES - 1] & 1);
    let mut result = Zeroizing::new(*scalar);
    let mut borrow = 0;
    for ((byte, order), result) in scalar.iter().zip(&ORDER).zip(result.iter_mut()).rev() {
        let [low, high] = u16::from(*order)
            .wrapping_sub(u16::from(*byte) + borrow)
            .to_le_bytes();
        borrow = u16::from(high & 1);
        result.conditional_assign(&low, is_even);
    }
    result
}

/// Five bits, which stand for a digit: the odd number twice their value less 31. The scalar is the sum of all digits, each times
/// 32 to the power of its place, and of 2^520.
// With k odd, k mod 64 - 32 is odd, and what is left, (k - digit) / 32, is twice k / 64 and 1: odd again.
fn bits_of(scalar: &[u8; BYTES], digit: usize) -> u8 {
    let first = WINDOW * digit + 1;
    let byte = |at: usize| scalar[BYTES - 1 - at];
    let (low, shift) = (first / 8, first % 8);
    // The highest bits of all are not in the last byte's last place, so there is always another byte.
    let both = u16::from_le_bytes([byte(low), byte(low + 1)]);
    ((both >> shift).to_le_bytes()[0]) & 31
}

/// A point as (x/z^2, y/z^3).
#[derive(Clone, Copy)]
struct Point {
    x: Element,
    y: Element,
    z: Element,
}

impl Point {
    /// 32 times the point.
    fn shifted(&self) -> Self {
        (0..WINDOW).fold(*self, |point, _| point.double())
    }

    // The formula "dbl-2001-b" of Bernstein's and Lange's database: right for every point of an odd order.
    fn double(&self) -> Self {
        let delta = self.z.square();
        let gamma = self.y.square();
        let beta = self.x.multiply(&gamma);
        let product = self.x.sub_loose(&delta).multiply(&self.x.add_loose(&delta));
        let alpha = product.double().add(&product);
        let beta4 = beta.double().double();
        let gamma2 = gamma.double_loose().square();
        let x = alpha.square().sub(&beta4.double());
        Self {
            x,
            y: alpha
                .relax()
                .multiply(&beta4.sub_loose(&x))
                .sub(&gamma2.double()),
            z: self.y.add_loose(&self.z).square().sub(&gamma).sub(&delta),
        }
    }

    // The formula "add-1998-cmo-2": right for two points that are neither the same nor opposite nor at infinity.
    fn add(&self, other: &Self) -> Self {
        let (zz, other_zz) = (self.z.square(), other.z.square());
        let (u, other_u) = (self.x.multiply(&other_zz), other.x.multiply(&zz));
        let s = self.y.multiply(&other.z.multiply(&other_zz));
        let other_s = other.y.multiply(&self.z.multiply(&zz));
        let h = other_u.sub(&u);
        let r = other_s.sub(&s);
        let hh = h.square();
        let hhh = h.multiply(&hh);
        let v = u.multiply(&hh);
        let x = r.square().sub(&hhh).sub(&v.double());
        Self {
            x,
            y: r.relax().multiply(&v.sub_loose(&x)).sub(&s.multiply(&hhh)),
            z: self.z.multiply(&other.z).multiply(&h),
        }
    }

    /// The same point as (x/z, y/z).
    fn homogeneous(&self) -> Self {
        Self {
            x: self.x.multiply(&self.z),
            y: self.y,
            z: self.z.square().multiply(&self.z),
        }
    }
}

/// Adds any two points but opposite ones; yields x and z of the sum as (x/z, y/z).
// Renes, Costello, Batina 2015, algorithm 4.
fn add_completely(one: &Point, other: &Point, b: &Element) -> (Element, Element) {
    let (one, other) = (one.homogeneous(), other.homogeneous());
    let triple = |value: &Element| value.double().add(value);
    let xx = one.x.multiply(&other.x);
    let yy = one.y.multiply(&other.y);
    let zz = one.z.multiply(&other.z);
    let mixed = |a: (&Element, &Element), b: (&Element, &Element), squares: Element| {
        let product = a.0.add_loose(a.1).multiply(&b.0.add_loose(b.1));
        product.sub(&squares)
    };
    let xy = mixed((&one.x, &one.y), (&other.x, &other.y), xx.add(&yy));
    let yz = mixed((&one.y, &one.z), (&other.y, &other.z), yy.add(&zz));
    let xz = mixed((&one.x, &one.z), (&other.x, &other.z), xx.add(&zz));
    let part = triple(&xz.sub(&b.multiply(&zz)));
    let (less, more) = (yy.sub(&part), yy.add(&part));
    let zz = triple(&zz);
    let cross = triple(&b.multiply(&xz).sub(&zz.add(&xx)));
    let slope = triple(&xx).sub(&zz);
    (
        more.multiply(&xy).sub(&yz.multiply(&cross)),
        less.multiply(&yz).add(&xy.multiply(&slope)),
    )
}

/// The odd multiples of a point.
struct Table([Point; MULTIPLES]);

impl Table {
    fn of(point: Point) -> Self {
        let twice = point.double();
        let mut table = [point; MULTIPLES];
        let mut last = point;
        for multiple in table.iter_mut().skip(1) {
            last = last.add(&twice);
            *multiple = last;
        }
        Self(table)
    }

    /// The multiple that five bits of the scalar stand for.
    fn multiple(&self, bits: u8) -> Point {
        // 16 is 1, 31 is 31, 15 is -1 and 0 is -31.
        let is_negative = Choice::from((bits >> 4) ^ 1);
        let wanted = u8::conditional_select(&bits, &!bits, is_negative) & 15;
        let mut found = self.0[0];
        for (index, point) in (0_u8..).zip(&self.0) {
            let is_it = index.ct_eq(&wanted);
            found.x.conditional_assign(&point.x, is_it);
            found.y.conditional_assign(&point.y, is_it);
            found.z.conditional_assign(&point.z, is_it);
        }
        let opposite = found.y.neg();
        found.y.conditional_assign(&opposite, is_negative);
        found
    }
}

#[cfg(test)]
mod tests {
    use p521::{PublicKey, SecretKey, elliptic_curve::sec1::ToSec1Point as _};
    use proptest::prelude::*;

    use super::*;

    /// What the crate says.
    fn by_crate(scalar: &[u8; BYTES], point: &PublicKey) -> Vec<u8> {
        let secret = SecretKey::from_slice(scalar).unwrap();
        secret.diffie_hellman(point).raw_secret_bytes().to_vec()
    }

    fn by_us(scalar: &[u8; BYTES], point: &PublicKey) -> Vec<u8> {
        let encoded = point.to_sec1_point(false);
        let coordinates = &encoded.as_bytes()[1..];
        let (x, y) = coordinates.split_first_chunk().unwrap();
        multiply(scalar, x, y.try_into().unwrap()).unwrap().to_vec()
    }

    fn point(scalar: &[u8; BYTES]) -> PublicKey {
        SecretKey::from_slice(scalar).unwrap().public_key()
    }

    fn small(number: u8) -> [u8; BYTES] {
        let mut scalar = [0; BYTES];
        scalar[BYTES - 1] = number;
        scalar
    }

    /// The order less a small number.
    fn large(number: u8) -> [u8; BYTES] {
        let mut scalar = ORDER;
        let low = u16::from_be_bytes([scalar[BYTES - 2], scalar[BYTES - 1]]) - u16::from(number);
        scalar[BYTES - 2..].copy_from_slice(&low.to_be_bytes());
        scalar
    }

    // Sums whose halves are equal or opposite come up only near zero and near the order.
    #[test]
    fn the_smallest_and_the_largest_scalars_give_what_the_crate_gives() {
        let base = point(&small(1));
        for number in 1..=130 {
            for scalar in [small(number), large(number)] {
                assert_eq!(by_us(&scalar, &base), by_crate(&scalar, &base), "{number}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_scalar_and_point_give_what_the_crate_gives(
            mut scalar: [u8; BYTES], mut other: [u8; BYTES], zeros in 0..BYTES,
        ) {
            // Below the order, and sometimes short.
            scalar[0] = 0;
            other[0] = 0;
            scalar[..zeros].fill(0);
            scalar[BYTES - 1] |= if zeros % 2 == 0 { 1 } else { 2 };
            other[BYTES - 1] |= 1;
            let point = point(&other);
            prop_assert_eq!(by_us(&scalar, &point), by_crate(&scalar, &point));
        }
    }
}
