#!/usr/bin/env python3
"""Says what the time of `/bin/true` in a guest went into, by the guest kernel's own record of events.

Usage: exec_steps.py TRACE (made as docs/performance.md says). Times in ms between the events that are named.
"""
import re
import statistics
import sys

LINE = re.compile(r"\s*.+-(\d+)\s+\[\d+\] \S+\s+(\d+\.\d+): (\S+): (.*)")
# System calls of x86-64, as raw_syscalls shows them.
READ_MESSAGE, SEND_MESSAGE, SEND, RECEIVE, EXECVE, WAIT, EXIT, WRITE = 47, 46, 44, 45, 59, 61, 231, 1


def events(path):
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = LINE.match(line)
            if found:
                pid, seconds, kind, rest = found.groups()
                yield int(pid), float(seconds), kind, rest


def entered(number):
    return lambda event: event[2] == "sys_enter" and event[3].startswith(f"NR {number} (")


def left(number, value=""):
    return lambda event: event[2] == "sys_exit" and event[3].startswith(f"NR {number} = {value}")


def of(pid, condition):
    return lambda event: event[0] == pid and condition(event)


def steps(all_events, at):
    """The events of one command, in order, around the one at which it is executed."""

    def before(start, condition):
        return next(index for index in range(start, -1, -1) if condition(all_events[index]))

    def after(start, condition):
        return next(index for index in range(start, len(all_events)) if condition(all_events[index]))

    program = all_events[at][0]
    executes = before(at, of(program, entered(EXECVE)))
    woken = before(executes, of(program, left(READ_MESSAGE)))
    launched = before(woken, entered(SEND_MESSAGE))
    agent = all_events[launched][0]
    asked = before(launched, lambda event: event[2] == "irq_handler_entry" and "virtio" in event[3])
    ends = after(at, of(program, entered(EXIT)))
    dead = after(ends, lambda event: event[0] == program and event[2] == "sched_process_exit")
    reaps = after(dead, entered(WAIT))
    init = all_events[reaps][0]
    tells = after(reaps, of(init, entered(SEND)))
    heard = after(tells, of(agent, left(RECEIVE)))
    answered = after(heard, of(agent, left(WRITE)))
    return [
        ("agent: the interrupt, until it launches", asked, launched),
        ("change: agent to the process that waits", launched, woken),
        ("that process becomes the user's, in its place", woken, executes),
        ("spawn: execve", executes, at),
        ("spawn: the program", at, ends),
        ("spawn: exit", ends, dead),
        ("change: the program's end to init", dead, reaps),
        ("init: reaps, ends the rest", reaps, tells),
        ("change: init to agent", tells, heard),
        ("agent: usage, output, answer", heard, answered),
        ("all of it", asked, answered),
    ]


def main():
    all_events = list(events(sys.argv[1]))
    taken = {}
    for at, event in enumerate(all_events):
        if event[2] == "sched_process_exec" and "filename=/bin/true" in event[3]:
            try:
                found = steps(all_events, at)
            except StopIteration:
                continue
            for name, start, end in found:
                taken.setdefault(name, []).append((all_events[end][1] - all_events[start][1]) * 1e3)
    print(f"{'':52} {'p25':>6} {'p50':>6}   n")
    for name, times in taken.items():
        times.sort()
        print(f"{name:52} {times[len(times) // 4]:6.2f} {statistics.median(times):6.2f}  {len(times)}")


main()
