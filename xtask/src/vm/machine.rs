//! A guest that is a whole machine: the distribution's own kernel under QEMU, with all that user-mode Linux lacks.
//!
//! No KVM is needed, so QEMU interprets every instruction: it is ten to twenty times slower. Kernel, QEMU and all that it
//! needs are unpacked and not installed, for a kernel's package would change what this machine boots, and QEMU's might
//! replace others. There is no disk: this machine's files come over 9P, and the few that are needed until then are put
//! together for each run.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use super::{
    Guest, Kernel,
    guest::make_executable,
    output_of,
    packages::{find, list_modules, unpack},
};
use crate::setup::{
    packages::{additions, dependency},
    step,
};

/// Depends on the kernel that the distribution has today.
const PACKAGE: &str = "linux-image-amd64";
/// The emulator and its package, of which this machine may have all or nothing.
const EMULATOR: &str = "qemu-system-x86_64";
const EMULATOR_PACKAGE: &str = "qemu-system-x86";
/// Where what is needed besides the kernel is unpacked, in its folder.
const TOOLS: &str = "tools";
/// The very first program.
const FIRST: &str = include_str!("first.sh");
/// The modules that it takes to reach this machine's files, and theirs with them.
const MODULES: [&str; 3] = ["virtio_pci", "9pnet_virtio", "9p"];
/// How the kernel is told to be quick, and to end rather than to hang.
const PARAMETERS: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable cryptomgr.notests";

/// Fetches and unpacks all that is needed into a folder.
pub(super) fn prepare(folder: &Path, program: &str) -> anyhow::Result<()> {
    unpack(|| Ok(vec![dependency(PACKAGE, "linux-image-")?]), folder)?;
    let merged = folder.join("usr/lib/modules");
    let modules = if merged.exists() {
        merged
    } else {
        folder.join("lib/modules")
    };
    let version = list_modules(folder, &modules)?;
    let image = folder.join(format!("boot/vmlinuz-{version}"));
    let image = fs::read(&image).with_context(|| image.display().to_string())?;
    let tools = folder.join(TOOLS);
    unpack(
        || {
            let mut names = additions(EMULATOR_PACKAGE)?;
            names.push("busybox-static".to_owned());
            Ok(names)
        },
        &tools,
    )?;
    take_out(&image, &folder.join(program))
}

/// Where a package of the distribution has busybox, which is the first program there and packs here.
fn busybox(tools: &Path) -> anyhow::Result<PathBuf> {
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| tools.join(place));
    let found = places.into_iter().find(|path| path.exists());
    found.context("there is no busybox in its package")
}

/// QEMU with everything that the guest needs, its output on the standard output and the kernel's words on the standard
/// error; the first process is told `facts`.
pub(super) fn command(
    guest: &Guest,
    control: &Path,
    facts: &[(&str, String)],
) -> anyhow::Result<Command> {
    let archive = first_files(&guest.kernel, control)?;
    let facts = facts.iter().map(|(name, value)| format!(" {name}={value}"));
    let append = format!("{PARAMETERS}{}", facts.collect::<String>());
    let share = |command: &mut Command, name: &str, path: &Path, options: &str| {
        let path = path.display();
        command
            .arg("-fsdev")
            .arg(format!(
                "local,id={name},path={path},security_model=none{options}"
            ))
            .arg("-device")
            .arg(format!("virtio-9p-pci,fsdev={name},mount_tag={name}"));
    };
    let tools = guest.kernel.folder.join(TOOLS);
    let unpacked = tools.join("usr/bin").join(EMULATOR);
    let mut command = if unpacked.exists() {
        let libraries = ["usr/lib", "lib"].map(|lib| tools.join(lib).join("x86_64-linux-gnu"));
        let mut command = Command::new(unpacked);
        command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries)?);
        command
    } else {
        Command::new(EMULATOR)
    };
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-machine", "pc", "-smp", "2"])
        // Four levels of page tables are quicker to walk than five.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"])
        .arg("-m")
        .arg(guest.memory.to_string())
        .arg("-kernel")
        .arg(guest.kernel.program())
        .arg("-initrd")
        .arg(archive)
        .arg("-append")
        .arg(append)
        // The kernel's own words go to the first serial line, the command's output to the second.
        .args(["-chardev", "file,id=console,path=/dev/stderr,append=on"])
        .args(["-chardev", "file,id=output,path=/dev/stdout,append=on"])
        .args(["-serial", "chardev:console", "-serial", "chardev:output"]);
    share(
        &mut command,
        "root",
        Path::new("/"),
        ",readonly=on,multidevs=remap",
    );
    share(&mut command, "control", control, "");
    Ok(command)
}

/// Archives the files that the guest has before it has this machine's.
fn first_files(kernel: &Kernel, control: &Path) -> anyhow::Result<PathBuf> {
    let tree = control.join("first");
    for folder in ["bin", "modules", "dev", "root"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    let busybox = busybox(&kernel.folder.join(TOOLS))?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    let mut order = String::new();
    for module in modules(kernel)? {
        let name = module.file_name().unwrap_or_default();
        let copy = tree.join("modules").join(name);
        fs::copy(&module, &copy).with_context(|| module.display().to_string())?;
        if copy.extension().is_some_and(|extension| extension == "xz") {
            output_of(Command::new("xz").arg("--decompress").arg(&copy))?;
        }
        let name = name.to_string_lossy();
        order += &format!("{}\n", name.trim_end_matches(".xz"));
    }
    fs::write(tree.join("modules/order"), order)?;
    fs::write(tree.join("init"), FIRST)?;
    make_executable(&tree.join("init"))?;
    let archive = "find . | bin/busybox cpio -o -H newc >../first.cpio";
    output_of(Command::new("sh").args(["-c", archive]).current_dir(&tree))?;
    Ok(control.join("first.cpio"))
}

/// The modules that are needed first, each behind those that it needs.
fn modules(kernel: &Kernel) -> anyhow::Result<Vec<PathBuf>> {
    let version = find(&kernel.folder.join("lib/modules"), "", "")?;
    let mut all = Vec::new();
    for name in MODULES {
        let listing = output_of(
            Command::new("/sbin/modprobe")
                .arg("--dirname")
                .arg(&kernel.folder)
                .arg("--set-version")
                .arg(version.file_name().unwrap_or_default())
                .args(["--show-depends", name]),
        )?;
        for module in inserted(&listing) {
            if !all.contains(&module) {
                all.push(module);
            }
        }
    }
    Ok(all)
}

/// The files in what `modprobe --show-depends` says: `insmod PATH`; what is part of the kernel is `builtin NAME`.
fn inserted(listing: &str) -> impl Iterator<Item = PathBuf> {
    let words = listing.lines().map(str::split_whitespace);
    words.filter_map(|mut words| {
        (words.next()? == "insmod").then(|| words.next().map(PathBuf::from))?
    })
}

/// Takes the kernel out of an image that unpacks itself, which it does for half a minute where instructions are
/// interpreted. QEMU starts it as well; where it is packed otherwise than by xz, the image has to do.
fn take_out(image: &[u8], to: &Path) -> anyhow::Result<()> {
    let packed = payload(image).filter(|packed| packed.starts_with(b"\xfd7zXZ\0"));
    let Some(packed) = packed else {
        return fs::write(to, image).with_context(|| to.display().to_string());
    };
    // The length of what was packed stands behind it.
    let (packed, _) = packed.split_at(packed.len().saturating_sub(4));
    let file = to.with_extension("packed");
    fs::write(&file, packed)?;
    step(
        Command::new("xz")
            .args(["--decompress", "--stdout"])
            .stdin(File::open(&file)?)
            .stdout(File::create(to)?),
        "unpacking the kernel",
    )?;
    fs::remove_file(file)?;
    Ok(())
}

/// What is packed in a kernel's image, as its header tells (Linux, Documentation/arch/x86/boot.rst).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    // setup_sects: sectors behind the first, 4 if it says 0.
    let sectors = match image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let start = (sectors + 1) * 512 + number(0x248)?;
    image.get(start..start.checked_add(number(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with one sector of set-up behind the first, and what is packed 16 bytes after them.
    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512 + 16];
        image[0x1f1] = 1;
        image[0x248] = 16;
        image[0x24c] = u8::try_from(packed.len()).unwrap();
        image.extend(packed);
        image.extend([0xee; 40]);
        image
    }

    #[test]
    fn what_is_packed_in_a_kernels_image_is_found() {
        let packed = b"\xfd7zXZ\0 and so on";
        assert_eq!(payload(&image(packed)), Some(&packed[..]));
    }

    #[test]
    fn an_image_that_ends_too_early_is_no_kernel() {
        let whole = image(b"packed");
        for length in 0..2 * 512 + 16 + 6 {
            assert_eq!(payload(&whole[..length]), None, "{length}");
        }
    }

    #[test]
    fn modules_of_a_guest_are_those_that_are_no_part_of_its_kernel() {
        let listing = "builtin fscache\ninsmod /m/9pnet.ko.xz\ninsmod /m/9p.ko.xz access=user\n";
        let files: Vec<_> = inserted(listing).collect();
        assert_eq!(
            files,
            [PathBuf::from("/m/9pnet.ko.xz"), "/m/9p.ko.xz".into()]
        );
    }
}
