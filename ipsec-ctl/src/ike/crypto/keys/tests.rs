//! The key schedule against two sources that are independent of us and of each other: the inputs of NIST's CAVP for
//! SP 800-135 with the answers that OpenSSL's self-test has for SHA-256, and a case of NIST's ACVP server.

use super::*;
use crate::ike::crypto::transform::{Esn, Group};

fn bytes(hex: &str) -> Vec<u8> {
    hex.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// The suite whose keys use up the most of the stream.
const SUITE: IkeSuite = IkeSuite {
    encryption: Encryption::AesCbc256,
    integrity: Some(Integrity::HmacSha256),
    prf: Prf::HmacSha256,
    group: Group::Modp2048,
};

const CHILD: ChildSuite = ChildSuite {
    encryption: Encryption::AesCbc256,
    integrity: Some(Integrity::HmacSha256),
    esn: Esn::No,
    group: None,
};

/// All keys in the order in which they are cut from the stream.
fn stream(keys: &IkeKeys) -> Vec<u8> {
    [
        &keys.sk_d,
        &keys.initiator.integrity,
        &keys.responder.integrity,
        &keys.initiator.encryption,
        &keys.responder.encryption,
        &keys.sk_pi,
        &keys.sk_pr,
    ]
    .map(Key::bytes)
    .concat()
}

fn child_stream(keys: &ChildKeys) -> Vec<u8> {
    [
        &keys.initiator.encryption,
        &keys.initiator.integrity,
        &keys.responder.encryption,
        &keys.responder.integrity,
    ]
    .map(Key::bytes)
    .concat()
}

#[test]
fn the_keys_of_an_ike_sa_and_of_its_children_are_those_of_the_self_test_of_openssl() {
    let secret = bytes(
        "\
        d084a30166a50fb7325c3960874a839449ef9741c2f4f947d0201dd8c1269273d79509f37e3ca3eb4fa2fe2a28254e28\
        9cd3f34dad4eb4df1a07685a4b8a94fa61e2491f7598b3ce65547ff133b3f63d1ac4175eaa695033f3cedb026a6873a3\
        6455172a8540b8a5d23a0143bed0390ee49b168269d75fffee9fb62be965993c",
    );
    let dkm = bytes(
        "\
        462b9dd525d4fd71169174272779e704baf62c6231779ae9efe8c58b21916b42010164af2111ebd762f6916ca9a6f0ee\
        05c8b320e4ee27705521de2589adea1878f1a551738af7c88dc4f0bb0c096a3f7d1f1a670fc79f49f678d60d665bb371\
        0c8657f03ba9f62b9a818d7a228968c506e237ae9502aa6db395c61ea6a3e79504f86b7368bfb5423df79e48809bbccd\
        49fd826d024f63d7c2a5566400a12e736aa034510428f5ea008fe2fc16886fa388274ea6c2b4fcfc6141bf04f8207ef8\
        afc224ea1059cb220dc0b23ac0e4ccda495a4e131b1d56e223aba5a48e8ed1f5",
    );
    let child = bytes(
        "\
        23647677e7d403fa1e3006f19840aee18ad9fecc4215814c4131bdeba98433d8b0e31bfbbddf822abcce5e06486aa388\
        022b75e27e1e68aa5983028b65282c730c5d49ef7606770376cfdec41f7cc435d816029989bc353d3b67b9fd1168ddcb\
        8978850da9b752aee6a30d0086d2c4d74ec0e03648a0dad334faf5fe88084e67b0f3e8fee8b5e1bd3850db540f1fb8cf\
        fe23c9e92cda209373f354880c246c753e2a0eca9cb73b9910a8531c4010e6768fa29f909e60af777fed6e739c3cfda0\
        3467e915d6f03fce9c41f5f9d578f8912d66a75457e79ee1d5bcc2be5c2f9bae",
    );
    let fresh = bytes(
        "\
        52f00ab174c25d5b7139ae5ff4e8e9eddee5992d2e36adf8a559ffd90dab1442e4fbe429d320c0f33552a17d1557fa41\
        ea70e8fb916c4fa27ed52b5f8ebd8461afa78f1159159a64055ac5f6319e29c28eae58cbc6847770f32c3fed1d047504\
        84f854790f95e9ec01bc5bc461f24966462e359511329305038e94deb6dd42c2",
    );
    let child_with_exchange = bytes(
        "\
        6a919387a5fa2835fe8a8237e4a14845bd2b9930db87eff7adf268f62186004902dba9aa942d0259a0edc4120b932a50\
        3865b57ba8fb88117ef5df7b26799cd8ba37aa5438108cb1a4fe117907c9d0597b708c3f11151fefd624d2317202b7c8\
        1430600e6fcbb6e1a8df2b4861ef2363d53de1be69057b0cf6634a7e7bfa97b3c2810623e2bd6757738777177036e9c3\
        a39794456954bd41fc444a12507ab9cac69a0540d13c29db8510f566a691691baa2d9569dacc990d56a454bb444bcbbe\
        8751b0550a5278812fc5ab4f28990dd6d608538d7ddde24dc81bdaaca7751fde",
    );
    let (ni, nr) = (bytes("3651fef5c9c35e93"), bytes("c09a8b90a3f04d59"));
    let nonces = Nonces {
        initiator: &ni,
        responder: &nr,
    };
    let (spi_i, spi_r) = (IkeSpi(0x8e5c_3ae5_0722_1684), IkeSpi(0xb1f2_01bb_155c_3acd));
    let keys = IkeKeys::derive(&SUITE, &secret, nonces, spi_i, spi_r);
    assert_eq!(stream(&keys), dkm[..224]);
    let plain = keys.child(Prf::HmacSha256, None, nonces, &CHILD);
    assert_eq!(child_stream(&plain), child[..128]);
    let exchanged = keys.child(Prf::HmacSha256, Some(&fresh), nonces, &CHILD);
    assert_eq!(child_stream(&exchanged), child_with_exchange[..128]);
}

#[test]
fn the_keys_of_an_ike_sa_are_those_of_nists_acvp_server() {
    let secret = bytes(
        "\
        9e3d6f5b906fac77cc7c877948f19113ff2aac2b51dda3d03803808e09b840e1e73dc8489c31659bdd78218b367da86d\
        c0ea41408acadc67860c8df60a8af0ee07bef7f05e51fd416b37f62d4429dcc5fa8a19faa648a0df2d279a9a72d0d2d4\
        a666b51342a2f7d9e4e7882aa90a8f20a7ffc6dd5e9755bdd23a92562be228f462a037d34a84c4c1677791fb067219c0\
        7ec57c9bc43474de3a009707635f5175e38f9dc3ca0de6249a8b12d37590be6942f6b67c580c83ff6402e130a85f4c79\
        4a078cc4dc5bb73542d5a74734d8e11c313f67b0d99c7d6f53791f824228f942d346ac56acefa9a9a79018d57cd67983\
        842459a1a21fc0f65e38b386045ec55b",
    );
    let dkm = bytes(
        "\
        cddd59534e22d7306c94d07d5c14fad33e58838e02c7a8fa9c421f66fb72e51b553bc4798039dc7dd51967d2df6759c4\
        196849e790d3874066c14443938ff6b04305b4a6e1297fc561554af242f404342721a1a92f0aa5fd66ea1835dec56404\
        2326b81ddde622818bfa1b413bd02817f3aadd4dc43dfd64ac1ec3f072088e972d871e1100a0c23ec40484a456858899\
        73984a17e8e081d0e80c91267d152e6b258c18525124fd2667249e1c645d98f6586e791222c5d4b94ae15f59d147f128\
        21aed76b0f43bf3cb36410e58611c3ce61f08ab39a12639395fc4725ac23c9ad8635b508bccacc79ab81ad68d531d439\
        e4379a916ea19b63bb021576ddc7e4c14f471e368a6ae46852129931952dbebc16ac8869c0462edd98f80445495301f1\
        bd6e1ab76312434c212de18aa260dbd1ebdb13a3ad91ada28d4cd533545eb93c0f2766e9034344855304dad700a1cac2\
        69dd9c36ccf08f01389d627b46d81f9cb43502fee7584f74441c96eac7f7d0eebeb6b13bcd3041a94b3d5b08e3699b97",
    );
    let ni = bytes(
        "\
        f096bc348f4c0be7a0932e065f72da82f9e312379cbec86574837e535dedd0f81e86fe52f9d89336b17bf5dc030e766e\
        71d25b60d724aaefe8b60c2383bd6395703214d6e04c545443e95b47adb11c80a60110c083402b335cdf9e4e2cd6200d\
        c3a28d1f8e1d6f8293dea1025707ce870439f9a3cb2638fe52a3f350cee833e4ebb34f7c3920b9a0a4dce7bc3e7dd650\
        2f6d365fbb0bc0131fc74048bd145e7b9be07f2e58fdf53a98b5af8c3958c592ecb1642d63cec46be1a77a2e5b525554\
        682114040fc201949b992e8076a2ba99f59c9b1368c69cb0e48ff0599290d4c635262ef4f1bb2e87c4cdf4ff7ea9fad2\
        010cbf30198b7a961606bf3e49c5618f",
    );
    let nr = bytes(
        "\
        aa241ead5c65408ae109d09993dba807ff23e00883a466f2f408bced7a8bb37729abb124de79a7652cdd450911b4ff1a\
        252d11b8d6ef065b48fd2703cb6d682712e24e92f6ce3511dbb6f78affafef1b0b875ae2b3c559783ea7f2138b831c23\
        6845b800d00aa28010c47d2f6744033a10b286e791d16dcbe31e9c994e45d659e65ecf03eaffcd916febb320913c97db\
        41415961dc02823849a2009d9c126cc4e50f6cfe1f447c691463ea1309b66de3bc39abbb0abc69525def486669e1f45a\
        ffbdd6fe1f5314edfc631e4655df289108697f906c6c82bc0d8c52343278cd32a93ff33247764d3cca18278c7876deb0\
        247ade36149d99f3ef1e746d90de0524",
    );
    let nonces = Nonces {
        initiator: &ni,
        responder: &nr,
    };
    let (spi_i, spi_r) = (IkeSpi(0xdc90_d7d6_83d1_c342), IkeSpi(0x4bad_dac5_301b_550b));
    let keys = IkeKeys::derive(&SUITE, &secret, nonces, spi_i, spi_r);
    assert_eq!(stream(&keys), dkm[..224]);
}
