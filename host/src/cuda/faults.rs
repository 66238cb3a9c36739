//! Driver calls that fail because a test says so (feature `fault-injection`).

use super::driver::DriverCall;
use std::cell::RefCell;

#[derive(Debug)]
struct Armed {
    call: String,
    /// Calls of that name that still succeed; `None` when the fault has happened.
    before: Option<u32>,
}

thread_local! {
    static ARMED: RefCell<Option<Armed>> = const { RefCell::new(None) };
}

/// A fault that waits for its driver call. Dropping it calls it off.
#[derive(Debug)]
pub struct Fault(());

impl Fault {
    /// Makes one driver call of this thread fail, unmade: of those named `call` (`cuMemAlloc`, as errors name them) the one behind
    /// `before` others. One at a time.
    pub fn arm(call: impl Into<String>, before: u32) -> Self {
        ARMED.set(Some(Armed { call: call.into(), before: Some(before) }));
        Self(())
    }

    /// Whether it has happened.
    pub fn has_happened(&self) -> bool {
        ARMED.with_borrow(|armed| armed.as_ref().is_some_and(|armed| armed.before.is_none()))
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        ARMED.set(None);
    }
}

/// Whether this call is the one that fails.
pub(super) fn is_due(call: DriverCall) -> bool {
    ARMED.with_borrow_mut(|armed| {
        let Some(Armed { call: name, before }) = armed else { return false };
        match before {
            Some(left) if *name == call.to_string() => {
                let is_due = *left == 0;
                *before = left.checked_sub(1);
                is_due
            }
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_behind_the_others_fails_once() {
        let fault = Fault::arm("cuMemAlloc", 1);
        let due =
            [DriverCall::MemAlloc, DriverCall::EventRecord, DriverCall::MemAlloc, DriverCall::MemAlloc].map(is_due);
        assert_eq!(due, [false, false, true, false]);
        assert!(fault.has_happened());
        drop(fault);
        assert!(!is_due(DriverCall::MemAlloc));
    }
}
