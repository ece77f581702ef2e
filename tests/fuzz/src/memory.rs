//! How much memory a program takes.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

/// The system's allocator, with a count. A program that demands a bound makes it its global allocator.
#[derive(Debug)]
pub struct Meter {
    held: AtomicUsize,
    most: AtomicUsize,
}

impl Meter {
    /// For a static.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a static needs a constant")]
    pub const fn new() -> Self {
        Self { held: AtomicUsize::new(0), most: AtomicUsize::new(0) }
    }

    /// Does some work and says how many bytes it held at once, beyond those that were held before.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        let before = self.held.load(Ordering::Relaxed);
        self.most.store(before, Ordering::Relaxed);
        let done = work();
        (done, self.most.load(Ordering::Relaxed).saturating_sub(before))
    }

    fn add(&self, size: usize) {
        let held = self.held.fetch_add(size, Ordering::Relaxed) + size;
        self.most.fetch_max(held, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does everything, only numbers are added.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: as promised to this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: as promised to this function.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.add(size); // both may be held for a moment
        self.held.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised to this function.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.held.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised to this function.
        unsafe { System.dealloc(block, layout) }
    }
}
