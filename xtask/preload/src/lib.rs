//! Lets user-mode Linux run on processors with AMX: preloaded into it, passes whole register states on to the host's kernel.
//!
//! ptrace(2) sets the extended state of a process only as a whole (Linux, xstateregs_set in arch/x86/kernel/fpu/regset.c).
//! User-mode Linux before 6.13 keeps as much as AVX-512 needs, 2696 bytes; with the tiles of AMX it would be 11,008, and its first
//! process dies at once. No process of a guest uses tiles, which a kernel gives on demand only (arch_prctl(2),
//! ARCH_REQ_XCOMP_PERM): what is missing is passed on as it was when the process began.
#![cfg(target_arch = "x86_64")]
#![expect(
    unsafe_code,
    reason = "a function of the C library is put in the place of another"
)]

use std::{
    arch::x86_64::__cpuid_count,
    cell::UnsafeCell,
    ffi::{c_long, c_uint, c_void},
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicPtr, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

/// The extended state among the sets of registers (include/uapi/linux/elf.h).
const NT_X86_XSTATE: usize = 0x202;
/// Where the words begin that tell which components the state has, and where the components end that are always there
/// (Intel's Software Developer's Manual, volume 1, section 13.4), in bytes.
const HEADER: usize = 512;
const COMPONENTS: usize = HEADER + 64;
/// The longest state that processors have is well below, in bytes.
const LONGEST: usize = 64 << 10;
/// The leaf of CPUID that tells where each component is.
const STATE_LEAF: u32 = 0xd;

/// A state on its way. User-mode Linux has small stacks, and a memory of its own where the C library would allocate.
struct Whole(UnsafeCell<[u8; LONGEST]>);

// SAFETY: only who has set `IN_USE` touches it.
unsafe impl Sync for Whole {}

static WHOLE: Whole = Whole(UnsafeCell::new([0; LONGEST]));
static IN_USE: AtomicBool = AtomicBool::new(false);
/// Bytes of a whole state; 0 until the kernel was asked.
static LENGTH: AtomicUsize = AtomicUsize::new(0);

type Ptrace = unsafe extern "C" fn(c_uint, libc::pid_t, *mut c_void, *mut c_void) -> c_long;

/// ptrace(2) as the C library has it, with extended states of any length. Its parameters are not variable here, which is the
/// same for callers by the calling convention of this architecture.
///
/// # Safety
///
/// As for ptrace(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(
    request: c_uint,
    process: libc::pid_t,
    address: *mut c_void,
    data: *mut c_void,
) -> c_long {
    let Some(real) = real() else {
        return -1;
    };
    let sets_state = request == libc::PTRACE_SETREGSET && address.addr() == NT_X86_XSTATE;
    if !sets_state || IN_USE.swap(true, Acquire) {
        // SAFETY: the caller answers for its parameters.
        return unsafe { real(request, process, address, data) };
    }
    // SAFETY: nobody else has the state now; the caller's parameters are a request to set one.
    let result = unsafe { set_state(real, process, data) };
    IN_USE.store(false, Release);
    result
}

/// The C library's own.
fn real() -> Option<Ptrace> {
    static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
    let mut real = REAL.load(Relaxed);
    if real.is_null() {
        // SAFETY: the name ends with a zero byte.
        real = unsafe { libc::dlsym(libc::RTLD_NEXT, c"ptrace".as_ptr()) };
        REAL.store(real, Relaxed);
    }
    // SAFETY: it is nothing, or the C library's function of that name, which takes these parameters.
    unsafe { std::mem::transmute::<*mut c_void, Option<Ptrace>>(real) }
}

/// Sets the extended state of a process, whatever there is of it.
///
/// # Safety
///
/// `data` points to an `iovec` that holds a state; nobody else uses [`WHOLE`].
unsafe fn set_state(real: Ptrace, process: libc::pid_t, data: *mut c_void) -> c_long {
    let kind = std::ptr::without_provenance_mut(NT_X86_XSTATE);
    // SAFETY: nobody else uses it.
    let whole = unsafe { &mut *WHOLE.0.get() };
    let mut all = libc::iovec {
        iov_base: whole.as_mut_ptr().cast(),
        iov_len: whole.len(),
    };
    if LENGTH.load(Relaxed) == 0 {
        // SAFETY: the kernel writes at most as many bytes as there are, and tells how many.
        let got = unsafe { real(libc::PTRACE_GETREGSET, process, kind, (&raw mut all).cast()) };
        if got == 0 {
            LENGTH.store(all.iov_len, Relaxed);
        }
    }
    all.iov_len = LENGTH.load(Relaxed);
    // SAFETY: the caller has it point to an `iovec`, which points to as many bytes as it says.
    let told: &[u8] = unsafe {
        let told = &*data.cast::<libc::iovec>();
        std::slice::from_raw_parts(told.iov_base.cast(), told.iov_len)
    };
    if told.len() < COMPONENTS || told.len() >= all.iov_len {
        // SAFETY: the caller's own request.
        return unsafe { real(libc::PTRACE_SETREGSET, process, kind, data) };
    }
    complete(told, &mut whole[..all.iov_len]);
    // SAFETY: as many bytes as a whole state has.
    unsafe { real(libc::PTRACE_SETREGSET, process, kind, (&raw mut all).cast()) }
}

/// Makes a whole state of the beginning of one: components that are not wholly there are as at the start of a process.
fn complete(told: &[u8], whole: &mut [u8]) {
    let (known, missing) = whole.split_at_mut(told.len());
    known.copy_from_slice(told);
    missing.fill(0);
    let Some(header) = known[HEADER..].first_chunk_mut::<8>() else {
        return;
    };
    let mut components = u64::from_le_bytes(*header);
    for (component, end) in ends().iter().enumerate() {
        if *end > told.len() {
            components &= !(1 << component);
        }
    }
    *header = components.to_le_bytes();
}

/// Where each component ends in a state, in bytes. CPUID is slow in a virtual machine: it is asked once.
fn ends() -> &'static [usize; 63] {
    static ENDS: OnceLock<[usize; 63]> = OnceLock::new();
    ENDS.get_or_init(|| {
        let mut ends = [0; 63];
        for (component, end) in (0..).zip(&mut ends).skip(2) {
            let place = __cpuid_count(STATE_LEAF, component);
            *end = (place.eax + place.ebx) as usize;
        }
        ends
    })
}

#[cfg(test)]
mod tests {
    use std::{io, os::unix::process::CommandExt, process::Command};

    use super::*;

    fn checked(result: c_long) -> io::Result<()> {
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    #[test]
    fn a_component_that_is_not_wholly_there_is_at_its_start() {
        let avx = __cpuid_count(STATE_LEAF, 2);
        let end = (avx.eax + avx.ebx) as usize;
        let mut told = vec![0xee; end];
        told[HEADER..HEADER + 8].copy_from_slice(&0b111_u64.to_le_bytes());
        let mut whole = vec![0xaa; end + 100];
        complete(&told, &mut whole);
        assert_eq!(whole[..end], told);
        assert_eq!(whole[end..], [0; 100]);
        let less = &told[..end - 1];
        complete(less, &mut whole);
        assert_eq!(whole[HEADER], 0b011);
    }

    #[test]
    fn the_state_of_a_process_is_set_from_its_beginning() {
        let none = null_mut;
        let trace_me = move || {
            // SAFETY: the request has no other parameters.
            checked(unsafe { ptrace(libc::PTRACE_TRACEME, 0, none(), none()) })
        };
        let mut command = Command::new("true");
        // SAFETY: one system call, of a process that has just been forked.
        unsafe { command.pre_exec(trace_me) };
        let mut child = command.spawn().unwrap();
        let process = child.id().try_into().unwrap();
        // It stops when it has become the other program.
        // SAFETY: without a place for its status none is written.
        assert_eq!(unsafe { libc::waitpid(process, null_mut(), 0) }, process);
        let mut state = vec![0_u8; LONGEST];
        let call = |request, bytes: &mut [u8]| {
            let mut data = libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            };
            let kind = std::ptr::without_provenance_mut(NT_X86_XSTATE);
            // SAFETY: the process is a child that is stopped, and the bytes are as many as told.
            checked(unsafe { ptrace(request, process, kind, (&raw mut data).cast()) }).unwrap();
            data.iov_len
        };
        let whole = call(libc::PTRACE_GETREGSET, &mut state);
        assert!(whole > COMPONENTS);
        call(libc::PTRACE_SETREGSET, &mut state[..whole]);
        call(libc::PTRACE_SETREGSET, &mut state[..COMPONENTS]);
        // SAFETY: as before.
        checked(unsafe { ptrace(libc::PTRACE_DETACH, process, none(), none()) }).unwrap();
        assert!(child.wait().unwrap().success());
    }
}
