//! What the kernel's source finds under the names of the device crate: threads for lanes, host memory for the device's.

use std::cell::RefCell;
use std::sync::{Arc, Barrier, Mutex};

/// What a lane knows of the launch.
pub(crate) struct Lane {
    pub(crate) thread: u32,
    pub(crate) cta: u32,
    pub(crate) ctas: u32,
    pub(crate) warp: Arc<Exchange>,
    pub(crate) shared_memory: Arc<Mutex<Vec<f32>>>,
}

/// Where the lanes of a warp meet and show each other a word.
pub(crate) struct Exchange {
    barrier: Barrier,
    words: Mutex<[u32; 32]>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self { barrier: Barrier::new(32), words: Mutex::default() }
    }
}

thread_local! {
    static LANE: RefCell<Option<Lane>> = const { RefCell::new(None) };
}

impl Lane {
    /// Makes the calling thread this lane.
    pub(crate) fn enter(self) {
        LANE.with(|lane| *lane.borrow_mut() = Some(self));
    }
}

fn here<R>(read: impl FnOnce(&Lane) -> R) -> R {
    LANE.with(|lane| read(lane.borrow().as_ref().expect("a lane")))
}

/// Shows `word` to the warp and reads all words. Every lane must come here.
fn exchange<R>(word: u32, read: impl FnOnce(u32, &[u32; 32]) -> R) -> R {
    here(|lane| {
        let number = lane.thread % 32;
        lane.warp.words.lock().expect("no lane panicked")[number as usize] = word;
        lane.warp.barrier.wait();
        let result = read(number, &lane.warp.words.lock().expect("no lane panicked"));
        lane.warp.barrier.wait();
        result
    })
}

pub(crate) mod shuffle {
    use super::exchange;

    pub(crate) fn xor_u32(value: u32, lane_mask: u32) -> u32 {
        exchange(value, |lane, words| words[(lane ^ lane_mask) as usize])
    }
    pub(crate) fn xor_f32(value: f32, lane_mask: u32) -> f32 {
        f32::from_bits(xor_u32(value.to_bits(), lane_mask))
    }
    pub(crate) fn from_lane_u32(value: u32, lane: u32) -> u32 {
        exchange(value, |_, words| words[lane as usize % 32])
    }
    pub(crate) fn from_lane_f32(value: f32, lane: u32) -> f32 {
        f32::from_bits(from_lane_u32(value.to_bits(), lane))
    }
    pub(crate) fn any(predicate: bool) -> bool {
        exchange(predicate.into(), |_, words| words.iter().any(|&word| word != 0))
    }
}

pub(crate) mod special {
    use super::here;

    pub(crate) fn thread_index() -> u32 {
        here(|lane| lane.thread)
    }
    pub(crate) fn cta_index() -> u32 {
        here(|lane| lane.cta)
    }
    pub(crate) fn cta_count() -> u32 {
        here(|lane| lane.ctas)
    }
    pub(crate) fn dynamic_smem() -> u32 {
        0
    }
}

pub(crate) mod barrier {
    /// Nothing: the warps of a CTA run one after the other, warp 0, which alone reads behind the barrier, last.
    pub(crate) fn sync_cta() {}
}

pub(crate) mod math {
    pub(crate) fn exp2(x: f32) -> f32 {
        x.exp2()
    }
    pub(crate) fn log2(x: f32) -> f32 {
        x.log2()
    }
    pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    pub(crate) fn reciprocal(x: f32) -> f32 {
        1.0 / x
    }
    pub(crate) fn max(a: f32, b: f32) -> f32 {
        a.max(b)
    }
}

pub(crate) mod switches {
    macro_rules! is_on {
        ($_symbol:expr) => {
            false
        };
    }
    pub(crate) use is_on;

    macro_rules! one_where_on {
        ($value:expr, $_symbol:expr) => {
            $value
        };
    }
    pub(crate) use one_where_on;
}

/// Loads and stores, aligned as the device wants them. Addresses must be those of live buffers of the test.
pub(crate) mod ldst {
    use super::here;

    macro_rules! loads {
        ($($name:ident -> $type:ty),*) => {
            $(pub(crate) unsafe fn $name(address: u64) -> $type {
                assert!(address.is_multiple_of(size_of::<$type>() as u64), "{address:#x}");
                // SAFETY: the caller's contract: a value of this type in a live buffer; aligned, as asserted.
                unsafe { std::ptr::with_exposed_provenance::<$type>(address as usize).read() }
            })*
        };
    }
    macro_rules! stores {
        ($($name:ident($type:ty)),*) => {
            $(pub(crate) unsafe fn $name(address: u64, value: $type) {
                assert!(address.is_multiple_of(size_of::<$type>() as u64), "{address:#x}");
                // SAFETY: the caller's contract: a place of this type in a live buffer that no other thread uses; aligned, as asserted.
                unsafe { std::ptr::with_exposed_provenance_mut::<$type>(address as usize).write(value) };
            })*
        };
    }
    loads!(request_global_u32 -> u32, request_global_u32x2 -> [u32; 2], request_global_u32x4 -> [u32; 4], load_global_u32 -> u32,
        load_global_u32x2 -> [u32; 2], load_global_u32x4 -> [u32; 4], load_global_l2_f32 -> f32, load_global_l2_f32x2 -> [f32; 2],
        load_global_l2_f32x4 -> [f32; 4]);
    stores!(store_global_u32(u32), store_global_u32x2([u32; 2]), store_global_f32(f32));

    pub(crate) unsafe fn load_shared_f32x2(address: u32) -> [f32; 2] {
        here(|lane| {
            let memory = lane.shared_memory.lock().expect("no lane panicked");
            [0, 1].map(|i| memory[address as usize / 4 + i])
        })
    }
    pub(crate) unsafe fn store_shared_f32x2(address: u32, values: [f32; 2]) {
        here(|lane| {
            let mut memory = lane.shared_memory.lock().expect("no lane panicked");
            memory[address as usize / 4..][..2].copy_from_slice(&values);
        });
    }
}
