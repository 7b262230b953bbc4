//! Tests of what needs no kernel.

use super::*;

#[test]
fn interfaces_get_elements_of_their_own_and_keep_them() {
    let mut regions = BTreeMap::new();
    assert_eq!(reserve(&mut regions, 7, 4), Some((0, 4)));
    assert_eq!(reserve(&mut regions, 9, 2), Some((4, 2)));
    assert_eq!(reserve(&mut regions, 7, 4), Some((0, 4)));
    assert_eq!(reserve(&mut regions, 7, 8), Some((6, 8)), "it grew");
    assert_eq!(reserve(&mut regions, 11, 3), Some((0, 3)), "in the gap");
    assert_eq!(reserve(&mut regions, 12, SOCKET_SLOTS), None);
}

#[test]
fn an_instance_is_named_like_a_folder() {
    assert!(folder("gateway-1").is_ok());
    for bad in ["", "..", "a/b", "a.b"] {
        assert!(folder(bad).is_err(), "{bad}");
    }
}
