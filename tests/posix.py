"""What a file system does that is written to, as a script: run in a VM, and on a mount on this host."""

# Each check is one that pjdfstest makes of a file system, for what is promised here.
POSIX = r"""
import errno, fcntl, mmap, os, stat, time

def fails(number, call, *args, **options):
    try:
        call(*args, **options)
    except OSError as error:
        assert error.errno == number, f'{call.__name__}{args}: {error}'
    else:
        raise AssertionError(f'{call.__name__}{args} works')

def mode(path): return stat.S_IMODE(os.lstat(path).st_mode)

# open, creat
os.umask(0o022)
fd = os.open('f', os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
assert mode('f') == 0o644 and os.fstat(fd).st_uid == os.getuid() == 0
fails(errno.EEXIST, os.open, 'f', os.O_CREAT | os.O_EXCL)
fails(errno.ENOENT, os.open, 'none', os.O_RDONLY)
fails(errno.ENOENT, os.open, 'none/f', os.O_CREAT)
fails(errno.ENOTDIR, os.open, 'f/x', os.O_RDONLY)
fails(errno.ENAMETOOLONG, os.open, 'x' * 256, os.O_CREAT)
os.close(os.open('x' * 255, os.O_CREAT | os.O_WRONLY)); os.unlink('x' * 255)
fails(errno.EISDIR, os.open, '.', os.O_WRONLY)
fails(errno.ENOTDIR, os.open, 'f', os.O_DIRECTORY)
# write, read, seek, holes, truncate
assert os.write(fd, b'0123456789') == 10 and os.lseek(fd, 0, os.SEEK_SET) == 0 and os.read(fd, 4) == b'0123'
os.pwrite(fd, b'end', 10_000)
assert os.fstat(fd).st_size == 10_003 and os.pread(fd, 3, 5_000) == b'\0\0\0'
os.ftruncate(fd, 5); assert os.pread(fd, 100, 0) == b'01234'
os.truncate('f', 8); assert os.pread(fd, 100, 0) == b'01234\0\0\0'
fails(errno.ENOENT, os.truncate, 'none', 0)
fails(errno.EISDIR, os.truncate, '.', 0)
fails(errno.EINVAL, os.ftruncate, fd, -1)
with open('f', 'w') as file:
    file.write('new')
assert os.pread(fd, 100, 0) == b'new' and os.stat('f').st_size == 3
# append, also by two at once
a, b = (os.open('f', os.O_WRONLY | os.O_APPEND) for _ in range(2))
for i in range(10):
    os.write(a, b'a'); os.write(b, b'b')
os.pwrite(a, b'!', 0)
assert open('f').read() == 'new' + 'ab' * 10 + '!', open('f').read()
os.fsync(a); os.fdatasync(b); os.close(a); os.close(b)
# a large file, bytes as they were written, by many small writes and one large
big = os.urandom(3_000_000)
with open('big', 'wb') as file:
    file.write(big[:1_000_000])
    for at in range(1_000_000, 1_100_000, 1000):
        file.write(big[at:at + 1000])
    file.write(big[1_100_000:])
assert open('big', 'rb').read() == big
# mmap, shared and written
with open('big', 'r+b') as file, mmap.mmap(file.fileno(), 0) as view:
    view[5000:5005] = b'MMAP!'
    view.flush()
assert open('big', 'rb').read() == big[:5000] + b'MMAP!' + big[5005:]
# times
os.utime('f', ns=(1_000_000_001, 2_000_000_002))
found = os.stat('f'); assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
os.utime('f'); assert abs(os.stat('f').st_mtime - time.time()) < 5
os.write(fd, b'x'); assert abs(os.stat('f').st_mtime - time.time()) < 5
# chmod, chown
for bits in (0o000, 0o400, 0o1777, 0o644):
    os.chmod('f', bits); assert mode('f') == bits
os.chmod('f', 0o4755); assert mode('f') == 0o755
os.chown('f', 0, 0); fails(errno.EPERM, os.chown, 'f', 1234, 0)
fails(errno.ENOENT, os.chmod, 'none', 0o644)
# directories
os.mkdir('d', 0o777); assert mode('d') == 0o755 and os.stat('d').st_nlink == 2
fails(errno.EEXIST, os.mkdir, 'd'); fails(errno.ENOENT, os.mkdir, 'none/d'); fails(errno.ENOTDIR, os.mkdir, 'f/d')
os.makedirs('d/e/f'); fails(errno.ENOTEMPTY, os.rmdir, 'd')
fails(errno.ENOTDIR, os.rmdir, 'f'); fails(errno.ENOENT, os.rmdir, 'none')
open('d/e/g', 'w').close(); assert sorted(os.listdir('d/e')) == ['f', 'g']
fails(errno.EISDIR, os.unlink, 'd'); fails(errno.ENOENT, os.unlink, 'none')
dirfd = os.open('d', os.O_RDONLY); os.fsync(dirfd); os.close(dirfd)
# rename
open('r1', 'w').write('one'); open('r2', 'w').write('two'); inode = os.stat('r1').st_ino
keep = open('r2')
os.rename('r1', 'r2')
assert open('r2').read() == 'one' and not os.path.exists('r1') and os.stat('r2').st_ino == inode and keep.read() == 'two'
os.rename('d', 'dd'); assert sorted(os.listdir('dd/e')) == ['f', 'g'] and not os.path.exists('d')
fails(errno.EINVAL, os.rename, 'dd', 'dd/e/x')
fails(errno.ENOTDIR, os.rename, 'dd', 'r2'); fails(errno.EISDIR, os.rename, 'r2', 'dd')
fails(errno.ENOENT, os.rename, 'none', 'x'); os.rename('r2', 'r2')
os.mkdir('empty'); os.rename('empty', 'dd/e/f'); assert os.listdir('dd/e/f') == []
os.rename('dd/e/g', 'top'); assert os.listdir('dd/e') == ['f']
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
open('x1', 'w').write('1'); open('x2', 'w').write('2')
assert libc.renameat2(-100, b'x1', -100, b'x2', 1) == -1 and ctypes.get_errno() == errno.EEXIST
assert libc.renameat2(-100, b'x1', -100, b'x2', 2) == 0 and (open('x1').read(), open('x2').read()) == ('2', '1')
# links
os.link('x1', 'x3'); assert os.stat('x1').st_nlink == 2 and os.path.samefile('x1', 'x3')
open('x3', 'a').write('more'); assert open('x1').read() == '2more'
os.unlink('x1'); assert os.stat('x3').st_nlink == 1 and open('x3').read() == '2more'
fails(errno.EEXIST, os.link, 'x3', 'x2'); fails(errno.EPERM, os.link, 'dd', 'x4'); fails(errno.ENOENT, os.link, 'none', 'x4')
os.symlink('x3', 's'); assert os.readlink('s') == 'x3' and open('s').read() == '2more' and os.lstat('s').st_size == 2
os.symlink('/nowhere/' + 'y' * 1000, 's2'); assert len(os.readlink('s2')) == 1009; fails(errno.EEXIST, os.symlink, 'a', 's')
os.utime('s', ns=(5, 6), follow_symlinks=False); assert os.lstat('s').st_mtime_ns == 6
# open and without a name
gone = open('gone', 'w+'); gone.write('still'); gone.flush(); os.unlink('gone')
assert not os.path.exists('gone') and os.fstat(gone.fileno()).st_nlink == 0
gone.seek(0); assert gone.read() == 'still'; gone.write(' here'); gone.truncate(7); gone.seek(0); assert gone.read() == 'still h'
# locks are the guest's own
with open('f') as one: fcntl.flock(one, fcntl.LOCK_EX); fcntl.lockf(open('f', 'r+'), fcntl.LOCK_EX)
for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK): fails(errno.EPERM, os.mknod, 'node', kind | 0o666, 0x103)
# a thousand names
os.mkdir('many')
for i in range(300): open(f'many/{i}', 'w').write(str(i))
assert sorted(map(int, os.listdir('many'))) == list(range(300)) and open('many/299').read() == '299'
for entry in os.scandir('many'): os.unlink(entry.path)
os.rmdir('many')
# by way of programs and of the JVM
import subprocess, shutil
commands = "mkdir p && cd p && echo one > a && cp a b && mv b c && cat a >> c && sed -i s/one/two/ c && ln -s c l && rm a"
subprocess.run(commands, shell=True, check=True)
assert open('p/l').read() == 'two\ntwo\n' and sorted(os.listdir('p')) == ['c', 'l']
shutil.copytree('p', 'q', symlinks=True); shutil.rmtree('p')
"""
