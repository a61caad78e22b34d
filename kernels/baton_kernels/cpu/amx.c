/* Linux lets a process use AMX's tiles only once it has asked to (its documentation, arch/x86/xstate.rst). */
#include "amx.h"

#if AMX && !defined(EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

/* 0, or 1 where the system does not allow it. */
EXPORT int baton_use_amx(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0; }
#else
EXPORT int baton_use_amx(void) { return 0; }
#endif
