//! Forks of a process that plans.
//!
//! A child has the forking thread alone: what other threads were making would never be made in it, and locks that they held
//! would stay locked for ever. So `os.fork` waits until no thread of this library plans, and the child finds what was planned.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::cell::Cell;
use std::sync::{Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Read by threads that plan, written by one that forks. Its state is one word, which a child takes over as it is: threads that
/// wait for it at the fork leave nothing locked.
static FORKING: RwLock<()> = RwLock::new(());

/// Threads that plan in the background.
static BACKGROUND: Mutex<usize> = Mutex::new(0);
static BACKGROUND_ENDED: Condvar = Condvar::new();

thread_local! {
    /// From before a fork by this thread until after it, in the parent and in the child.
    static FORKS: Cell<Option<RwLockWriteGuard<'static, ()>>> = const { Cell::new(None) };
}

/// Held while a thread holds locks without the interpreter's: no fork happens meanwhile. Only a thread that has let go of the
/// interpreter may ask for it, because one that forks gets it back first. None in the forking thread itself.
pub(crate) fn hold_off() -> Option<RwLockReadGuard<'static, ()>> {
    let guard = FORKS.take();
    let forks_here = guard.is_some();
    FORKS.set(guard);
    (!forks_here).then(|| FORKING.read().unwrap_or_else(PoisonError::into_inner))
}

/// A thread that plans in the background; no fork happens while this lives.
#[derive(Debug)]
pub(crate) struct Background(());

impl Background {
    pub(crate) fn begin(py: Python<'_>) -> Self {
        py.detach(|| {
            let _no_fork = hold_off();
            *BACKGROUND.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        });
        Self(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        *BACKGROUND.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        BACKGROUND_ENDED.notify_all();
    }
}

#[pyfunction]
fn before_fork(py: Python<'_>) {
    py.detach(|| {
        FORKS.set(Some(FORKING.write().unwrap_or_else(PoisonError::into_inner)));
        // None begins any more, and who has ended has let go of the lock before it is seen here.
        let running = BACKGROUND.lock().unwrap_or_else(PoisonError::into_inner);
        drop(BACKGROUND_ENDED.wait_while(running, |running| *running > 0));
    });
}

#[pyfunction]
fn after_fork() {
    drop(FORKS.take());
}

/// Has Python call these around its forks.
pub(crate) fn register(py: Python<'_>) -> PyResult<()> {
    let hooks = PyDict::new(py);
    let after = wrap_pyfunction!(after_fork, py)?;
    hooks.set_item("before", wrap_pyfunction!(before_fork, py)?)?;
    hooks.set_item("after_in_parent", &after)?;
    hooks.set_item("after_in_child", after)?;
    py.import("os")?.call_method("register_at_fork", (), Some(&hooks)).map(drop)
}
